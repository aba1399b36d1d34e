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
#[derive(Debug)]
pub struct Accounts {
    /// Lines of the broker's configuration.
    pub broker: String,
    /// JWT and nkey seed of the user.
    pub credentials: PathBuf,
    /// The authority that signed the broker's certificate.
    pub authority: PathBuf,
}

impl Accounts {
    /// Makes all keys, signs all JWTs and writes the files into `folder`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn create(folder: &Path) -> Result<Self> {
        let certificates = Certificates::create(folder)?;
        let (operator, system, account, user) =
            (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account(), KeyPair::new_user());
        let limits: Value = serde_json::from_str(LIMITS)?;
        let of_account = json!({"type": "account", "version": 2, "limits": limits});
        let mut without_storage = of_account.clone();
        for kind in ["mem_storage", "disk_storage", "streams", "consumer"] {
            without_storage["limits"][kind] = json!(0);
        }
        let of_user = json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1});
        let signed = |key: &KeyPair, name: &str, what: &Value| jwt(&operator, key, name, what);
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
        fs::write(
            &credentials,
            format!(
                "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
                 -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
                jwt(&account, &user, "user", &of_user)?,
                user.seed()?
            ),
        )?;
        Ok(Self { broker, credentials, authority: certificates.file("ca.crt") })
    }
}

/// What `issuer` says of `subject`, signed.
fn jwt(issuer: &KeyPair, subject: &KeyPair, name: &str, what: &Value) -> Result<String> {
    let head = json!({"typ": "JWT", "alg": "ed25519-nkey"});
    let claims = json!({
        "jti": name, "iat": 1, "iss": issuer.public_key(), "sub": subject.public_key(), "name": name, "nats": what,
    });
    let encoded = |value: &Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let text = format!("{}.{}", encoded(&head), encoded(&claims));
    let signature = issuer.sign(text.as_bytes())?;
    Ok(format!("{text}.{}", BASE64URL_NOPAD.encode(&signature)))
}
