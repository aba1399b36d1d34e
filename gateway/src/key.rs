//! `millrace key`: the keys of the HTTP API, in a bucket of the broker that holds only hashes of them.

use async_nats::jetstream::context::KeyValueErrorKind;
use async_nats::jetstream::kv::{self, Store};
use async_nats::jetstream::{Context, stream::StorageType};
use futures::TryStreamExt;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::args::{Global, KeyCommand, KeyCreateArgs, KeyLimitCommandArgs};
use crate::connect;
use crate::failure::{Failure, Verdict};
use crate::http::keys::{BUCKET, FreshKey, KeyRecord, KeyScopes};
use crate::http::limits::set::{LimitRule, LimitSet};
use crate::output::{Printer, note, table};
use crate::plan;

/// Most keys that are listed.
const LISTED_MAX: usize = 100_000;
/// Longest name of a tenant, and longest label, in bytes.
const TEXT_BYTES_MAX: usize = 256;

/// Runs the command.
///
/// # Errors
/// See [`Failure`].
pub async fn run(global: &Global, command: &KeyCommand) -> Result<Verdict, Failure> {
    let printer = Printer { json: global.json };
    let planned = match command {
        KeyCommand::Create(args) => Some(plan(args, OffsetDateTime::now_utc())?),
        KeyCommand::Limit(args) => {
            limits("--key-limit", &args.limits.key_limit)?;
            limits("--tenant-limit", &args.limits.tenant_limit)?;
            None
        }
        _ => None,
    };
    let jetstream = connect::jetstream_of(&connect::connect_without_model(global).await?);
    match (command, planned) {
        (KeyCommand::Create(args), Some(record)) => create(&jetstream, args, record, printer).await,
        (KeyCommand::Limit(args), _) => limit(&jetstream, args, printer).await,
        (KeyCommand::Revoke { ids }, _) => revoke(&jetstream, ids, printer).await,
        _ => list(&jetstream, printer).await,
    }
}

/// The record of a new key, but for its hash.
fn plan(args: &KeyCreateArgs, now: OffsetDateTime) -> Result<KeyRecord, Failure> {
    for (name, text) in [("--tenant", &args.tenant), ("--label", &args.label)] {
        if text.len() > TEXT_BYTES_MAX {
            let message = format!("{name} has {} bytes; {TEXT_BYTES_MAX} are allowed", text.len());
            return Err(Failure::Usage(message));
        }
    }
    if args.tenant.is_empty() {
        return Err(Failure::Usage("--tenant is empty".to_owned()));
    }
    let names = |option: &str, names: &[String]| {
        let parsed = names
            .iter()
            .map(|name| name.parse().map_err(|error| Failure::Usage(format!("{option} {name:?}: {error}"))));
        parsed.collect::<Result<Vec<_>, _>>()
    };
    let expires = args.expires.as_deref().map(|text| plan::time("--expires", text, now)).transpose();
    Ok(KeyRecord {
        sha256: String::new(),
        tenant: args.tenant.clone(),
        label: args.label.clone(),
        created: now,
        expires: expires.map_err(Failure::Usage)?,
        revoked: None,
        scopes: KeyScopes {
            namespaces: names("--allow-namespace", &args.allow_namespace)?,
            models: names("--allow-model", &args.allow_model)?,
            verbs: args.allow_verb.clone(),
            classes: args.allow_class.clone(),
        },
        limits: limits("--key-limit", &args.limits.key_limit)?,
        tenant_limits: limits("--tenant-limit", &args.limits.tenant_limit)?,
        weight: args.limits.weight.unwrap_or(1),
        cache: args.limits.cache,
    })
}

fn limits(option: &str, rules: &[LimitRule]) -> Result<LimitSet, Failure> {
    LimitSet::of(rules).map_err(|reason| Failure::Usage(format!("{option}: {reason}")))
}

/// A record with other limits.
fn limited(record: KeyRecord, args: &KeyLimitCommandArgs) -> Result<KeyRecord, Failure> {
    let record = match args.clear {
        true => KeyRecord {
            limits: LimitSet::default(),
            tenant_limits: LimitSet::default(),
            weight: 1,
            cache: None,
            ..record
        },
        false => record,
    };
    Ok(KeyRecord {
        limits: limits("--key-limit", &args.limits.key_limit)?.or(record.limits),
        tenant_limits: limits("--tenant-limit", &args.limits.tenant_limit)?.or(record.tenant_limits),
        weight: args.limits.weight.unwrap_or(record.weight),
        cache: args.limits.cache.or(record.cache),
        ..record
    })
}

fn refused(error: impl std::fmt::Display) -> Failure {
    Failure::Refused(format!("the bucket {BUCKET} of keys: {error}"))
}

/// The bucket, unless there is none yet.
async fn bucket(jetstream: &Context) -> Result<Option<Store>, Failure> {
    match jetstream.get_key_value(BUCKET).await {
        Ok(store) => Ok(Some(store)),
        Err(error) if error.kind() == KeyValueErrorKind::GetBucket => Ok(None),
        Err(error) => Err(refused(error)),
    }
}

async fn create(
    jetstream: &Context,
    args: &KeyCreateArgs,
    record: KeyRecord,
    printer: Printer,
) -> Result<Verdict, Failure> {
    let store = match bucket(jetstream).await? {
        Some(store) => store,
        None => {
            let config = kv::Config {
                bucket: BUCKET.to_owned(),
                description: "Keys of the HTTP API, hashed".to_owned(),
                storage: StorageType::File,
                num_replicas: args.replicas.into(),
                ..kv::Config::default()
            };
            jetstream.create_key_value(config).await.map_err(refused)?
        }
    };
    let fresh = FreshKey::make();
    let record = KeyRecord { sha256: fresh.sha256, ..record };
    let body = serde_json::to_vec(&record).expect("our own types are JSON");
    store.create(&fresh.id, body.into()).await.map_err(refused)?;
    note(&format!("key {} of tenant {}: this is the only time that it is shown", fresh.id, record.tenant));
    printer.object(&json!({"id": fresh.id, "key": fresh.key, "tenant": record.tenant}));
    printer.say(&fresh.key);
    Ok(Verdict::Well)
}

async fn limit(
    jetstream: &Context,
    args: &KeyLimitCommandArgs,
    printer: Printer,
) -> Result<Verdict, Failure> {
    let store = bucket(jetstream).await?;
    let mut changed = 0;
    for id in &args.ids {
        let done = match &store {
            Some(store) => change(store, id, |record| limited(record, args)).await?,
            None => false,
        };
        changed += usize::from(done);
        printer.object(&json!({"id": id, "changed": done}));
        printer.say(&format!("{id}: {}", if done { "changed" } else { "no such key" }));
    }
    Ok(Verdict::of(changed == args.ids.len()))
}

async fn revoke(jetstream: &Context, ids: &[String], printer: Printer) -> Result<Verdict, Failure> {
    let store = bucket(jetstream).await?;
    let mut revoked = 0;
    for id in ids {
        let done = match &store {
            Some(store) => change(store, id, |record| Ok(revoked_now(record))).await?,
            None => false,
        };
        revoked += usize::from(done);
        printer.object(&json!({"id": id, "revoked": done}));
        printer.say(&format!("{id}: {}", if done { "revoked" } else { "no such key" }));
    }
    Ok(Verdict::of(revoked == ids.len()))
}

/// One that was revoked before stays so.
fn revoked_now(record: KeyRecord) -> KeyRecord {
    KeyRecord { revoked: record.revoked.or_else(|| Some(OffsetDateTime::now_utc())), ..record }
}

/// Writes another record in the place of a key's, unless somebody else did in between; whether there is such a key.
async fn change(
    store: &Store,
    id: &str,
    change: impl FnOnce(KeyRecord) -> Result<KeyRecord, Failure>,
) -> Result<bool, Failure> {
    let Some(entry) = store.entry(id).await.map_err(refused)? else { return Ok(false) };
    let Ok(record) = serde_json::from_slice::<KeyRecord>(&entry.value) else { return Ok(false) };
    let changed = change(record.clone())?;
    if changed != record {
        let body = serde_json::to_vec(&changed).expect("our own types are JSON");
        store.update(id, body.into(), entry.revision).await.map_err(refused)?;
    }
    Ok(true)
}

async fn list(jetstream: &Context, printer: Printer) -> Result<Verdict, Failure> {
    let Some(store) = bucket(jetstream).await? else {
        note("there is no key yet: `millrace key create` makes the first");
        return Ok(Verdict::Well);
    };
    let mut ids: Vec<String> = store.keys().await.map_err(refused)?.try_collect().await.map_err(refused)?;
    ids.sort_unstable();
    ids.truncate(LISTED_MAX);
    let time = |at: Option<OffsetDateTime>| at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default();
    let mut rows = Vec::new();
    for id in ids {
        let Some(body) = store.get(&id).await.map_err(refused)? else { continue };
        let Ok(record) = serde_json::from_slice::<KeyRecord>(&body) else {
            note(&format!("error: key {id}: its record cannot be read"));
            continue;
        };
        printer.object(&json!({
            "id": id, "tenant": record.tenant, "label": record.label, "created": time(Some(record.created)),
            "expires": record.expires.map(|at| time(Some(at))), "revoked": record.revoked.map(|at| time(Some(at))),
            "scopes": record.scopes, "limits": record.limits, "tenant_limits": record.tenant_limits,
            "weight": record.weight, "cache": record.cache,
        }));
        rows.push(vec![id, record.tenant, time(record.expires), time(record.revoked), record.label]);
    }
    printer.say(&table(&["id", "tenant", "expires", "revoked", "label"], &rows));
    Ok(Verdict::Well)
}
