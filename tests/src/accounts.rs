//! What a broker needs to take nobody without credentials, and only over TLS: an operator, its accounts and one user,
//! as the signed JWTs that NATS calls decentralized authentication. All keys are new for each start.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use serde_json::{Value, json};

use crate::certificates::Certificates;

/// Rights of an account: all of them, without limits.
const LIMITS: &str = r#"{"subs":-1,"data":-1,"payload":-1,"imports":-1,"exports":-1,"wildcards":true,"conn":-1,
    "leaf":-1,"mem_storage":-1,"disk_storage":-1,"streams":-1,"consumer":-1}"#;

/// The files of one user, and the broker's side.
pub struct Accounts {
    /// Lines of the broker's configuration.
    pub broker: String,
    /// JWT and nkey seed of the user.
    pub credentials: PathBuf,
    /// The authority that signed the broker's certificate.
    pub authority: PathBuf,
    /// The account, which signs users.
    account: KeyPair,
}

impl std::fmt::Debug for Accounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accounts").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

impl Accounts {
    /// Makes all keys, signs all JWTs and writes the files into `folder`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn create(folder: &Path) -> Result<Self> {
        let certificates = Certificates::create(folder)?;
        let (operator, system, account) =
            (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
        let limits: Value = serde_json::from_str(LIMITS)?;
        let of_account = json!({"type": "account", "version": 2, "limits": limits});
        let mut without_storage = of_account.clone();
        for kind in ["mem_storage", "disk_storage", "streams", "consumer"] {
            without_storage["limits"][kind] = json!(0);
        }
        let signed = |key: &KeyPair, name: &str, what: &Value| jwt((&operator, key), name, what, None);
        let broker = format!(
            "tls {{ cert_file: {:?}, key_file: {:?} }}\noperator: {}\nsystem_account: {}\nresolver: MEMORY\n\
             resolver_preload {{ {}: {}, {}: {} }}",
            certificates.file("server.crt"),
            certificates.file("server.key"),
            signed(&operator, "operator", &json!({"type": "operator", "version": 2}))?,
            system.public_key(),
            system.public_key(),
            signed(&system, "system", &without_storage)?,
            account.public_key(),
            signed(&account, "account", &of_account)?,
        );
        let credentials = folder.join("user.creds");
        let made = Self { broker, credentials, authority: certificates.file("ca.crt"), account };
        made.write_user(&made.credentials, &json!({}), None)?;
        Ok(made)
    }

    /// Makes a user of its own with these permissions (`pub` and `sub`, all without them) and writes its file; the user
    /// ends at `end`, in Unix seconds.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_user(&self, file: &Path, permissions: &Value, end: Option<i64>) -> Result<()> {
        let user = KeyPair::new_user();
        let mut what = json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1});
        for (name, value) in permissions.as_object().into_iter().flatten() {
            what[name] = value.clone();
        }
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            jwt((&self.account, &user), "user", &what, end)?,
            user.seed()?
        );
        // Whole or not at all, as a mounted Secret changes.
        let part = file.with_extension("part");
        fs::write(&part, text)?;
        Ok(fs::rename(part, file)?)
    }
}

/// What `issuer` says of `subject`, signed.
fn jwt(
    (issuer, subject): (&KeyPair, &KeyPair),
    name: &str,
    what: &Value,
    end: Option<i64>,
) -> Result<String> {
    let head = json!({"typ": "JWT", "alg": "ed25519-nkey"});
    let mut claims = json!({
        "jti": name, "iat": 1, "iss": issuer.public_key(), "sub": subject.public_key(), "name": name, "nats": what,
    });
    if let Some(end) = end {
        claims["exp"] = json!(end);
    }
    let encoded = |value: &Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let text = format!("{}.{}", encoded(&head), encoded(&claims));
    let signature = issuer.sign(text.as_bytes())?;
    Ok(format!("{text}.{}", BASE64URL_NOPAD.encode(&signature)))
}
