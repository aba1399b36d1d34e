//! Who one is to the broker.
//!
//! What is in a file is read anew for each connection, so that a rotated secret is used by the next one. Nothing here
//! is ever printed but names of fields and files, and the time at which a JWT ends.

use std::fmt;
use std::path::{Path, PathBuf};

use async_nats::{Auth, ServerAddr};
use data_encoding::BASE64URL_NOPAD;
use millrace_crds::config::NatsConfig;
use nkeys::KeyPair;
use percent_encoding::percent_decode_str;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::broker::BrokerError;

/// Largest file of a login.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// A text that is not printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    /// Given as it is.
    Text(String),
    /// In a file.
    File(PathBuf),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Secret::Text(_) => f.write_str("***"),
            Secret::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Secret {
    /// The text, without space around it.
    fn read(&self) -> Result<String, String> {
        let path = match self {
            Secret::Text(text) => return Ok(text.clone()),
            Secret::File(path) => path,
        };
        let wrong = |reason: &dyn fmt::Display| format!("{}: {reason}", path.display());
        let bytes = std::fs::metadata(path).map_err(|error| wrong(&error))?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(wrong(&format!("{bytes} bytes; at most {FILE_BYTES_MAX} are allowed")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
        match text.trim() {
            "" => Err(wrong(&"it is empty")),
            text => Ok(text.to_owned()),
        }
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Secret::Text(_) => None,
            Secret::File(path) => Some(path),
        }
    }
}

/// How one logs in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Login {
    /// Not at all, or by a client certificate alone.
    #[default]
    Nobody,
    /// By name and password.
    User(Secret, Secret),
    /// By a token.
    Token(Secret),
    /// By the seed of an nkey.
    Nkey(Secret),
    /// By a JWT and the seed of its nkey.
    Jwt(Secret),
}

impl Login {
    /// As the configuration says; where it says nothing, as the first address with a user does.
    ///
    /// # Errors
    /// When there is more than one login, or a user without a password.
    pub fn of(config: &NatsConfig, addresses: &[ServerAddr]) -> Result<Self, BrokerError> {
        let wrong = |field, message: &str| BrokerError::Config { field, message: message.to_owned() };
        let file = |path: &Option<PathBuf>| path.clone().map(Secret::File);
        let user = match (file(&config.user_file), file(&config.password_file)) {
            (Some(user), Some(password)) => Some(Login::User(user, password)),
            (None, None) => None,
            (Some(_), None) => return Err(wrong("userFile", "passwordFile is missing beside it")),
            (None, Some(_)) => return Err(wrong("passwordFile", "userFile is missing beside it")),
        };
        let logins = [
            ("credentialsFile", file(&config.credentials_file).map(Login::Jwt)),
            ("nkeyFile", file(&config.nkey_file).map(Login::Nkey)),
            ("userFile", user),
            ("tokenFile", file(&config.token_file).map(Login::Token)),
        ];
        let mut given = logins.into_iter().filter_map(|(field, login)| Some((field, login?)));
        let Some((first, login)) = given.next() else {
            return Ok(addresses.iter().find_map(of_address).unwrap_or_default());
        };
        match given.next() {
            None => Ok(login),
            Some((second, _)) => Err(wrong(second, &format!("{first} is given too; there is one login"))),
        }
    }

    /// The files that it is read from.
    pub fn files(&self) -> Vec<&Path> {
        let secrets: &[&Secret] = match self {
            Login::Nobody => &[],
            Login::User(user, password) => &[user, password],
            Login::Token(secret) | Login::Nkey(secret) | Login::Jwt(secret) => &[secret],
        };
        secrets.iter().filter_map(|secret| secret.path()).collect()
    }

    /// What the client says of itself, of the files as they are now; the server's `nonce` is signed where it must be.
    ///
    /// # Errors
    /// With the file and what is wrong with it.
    pub fn auth(&self, nonce: &[u8]) -> Result<Auth, String> {
        let mut auth = Auth::new();
        match self {
            Login::Nobody => {}
            Login::User(user, password) => {
                (auth.username, auth.password) = (Some(user.read()?), Some(password.read()?));
            }
            Login::Token(token) => auth.token = Some(token.read()?),
            Login::Nkey(secret) => {
                let text = secret.read()?;
                let seed = text.lines().map(str::trim).find(|line| line.starts_with('S'));
                let key = key_pair(secret, seed)?;
                auth.nkey = Some(key.public_key());
                auth.signature = Some(key.sign(nonce).map_err(|error| error.to_string())?);
            }
            Login::Jwt(secret) => {
                let text = secret.read()?;
                let key = key_pair(secret, block(&text, "SEED"))?;
                let jwt =
                    block(&text, "JWT").ok_or_else(|| format!("{secret:?}: no JWT of a user is in it"))?;
                auth.jwt = Some(jwt.to_owned());
                auth.signature = Some(key.sign(nonce).map_err(|error| error.to_string())?);
            }
        }
        Ok(auth)
    }

    /// Why the broker may have refused it, as far as that can be told from here: a JWT that has ended.
    pub fn ended(&self, now: OffsetDateTime) -> Option<String> {
        let Login::Jwt(secret) = self else { return None };
        let text = secret.read().ok()?;
        let end = ends_at(block(&text, "JWT")?).filter(|end| *end <= now)?;
        Some(format!("the JWT in {secret:?} ended at {}", end.format(&Rfc3339).ok()?))
    }
}

/// The login that stands in an address: user and password, or a token.
fn of_address(address: &ServerAddr) -> Option<Login> {
    let text = |text: &str| Secret::Text(percent_decode_str(text).decode_utf8_lossy().into_owned());
    let user = text(address.username()?);
    Some(match address.password() {
        Some(password) => Login::User(user, text(password)),
        None => Login::Token(user),
    })
}

fn key_pair(secret: &Secret, seed: Option<&str>) -> Result<KeyPair, String> {
    let seed = seed.ok_or_else(|| format!("{secret:?}: no nkey seed is in it"))?;
    KeyPair::from_seed(seed).map_err(|error| format!("{secret:?}: the nkey seed: {error}"))
}

/// The line behind `-----BEGIN ... WHAT-----`.
fn block<'a>(text: &'a str, what: &str) -> Option<&'a str> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.find(|line| line.starts_with("---") && line.contains("BEGIN") && line.contains(what))?;
    lines.next().filter(|line| !line.starts_with('-'))
}

/// When a JWT ends, if it does.
fn ends_at(jwt: &str) -> Option<OffsetDateTime> {
    let claims = BASE64URL_NOPAD.decode(jwt.split('.').nth(1)?.as_bytes()).ok()?;
    let claims: Value = serde_json::from_slice(&claims).ok()?;
    OffsetDateTime::from_unix_timestamp(claims.get("exp")?.as_i64()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::Text(text.to_owned())
    }

    #[test]
    fn logins_of_addresses() {
        let of = |text: &str| Login::of(&NatsConfig::default(), &[text.parse().unwrap()]).unwrap();
        assert_eq!(of("nats://host:4222"), Login::Nobody);
        assert_eq!(of("nats://me:a%40b%2F@host"), Login::User(secret("me"), secret("a@b/")));
        assert_eq!(of("tls://token@host:4222"), Login::Token(secret("token")));
        assert_eq!(format!("{:?}", of("nats://me:hidden@host")), "User(***, ***)");
    }

    #[test]
    fn there_is_one_login_and_it_is_whole() {
        let address = ["nats://me:a@host".parse().unwrap()];
        let of = |yaml: &str| {
            let config: NatsConfig = serde_yaml::from_str(&format!("{{servers: [x], {yaml}}}")).unwrap();
            Login::of(&config, &address).map_err(|error| error.to_string())
        };
        assert_eq!(of("tokenFile: /t"), Ok(Login::Token(Secret::File("/t".into()))), "before the address's");
        let error = of("tokenFile: /t, nkeyFile: /n").unwrap_err();
        assert!(error.contains("nats.tokenFile") && error.contains("nkeyFile"), "{error}");
        let error = of("userFile: /u").unwrap_err();
        assert!(error.contains("nats.userFile") && error.contains("passwordFile"), "{error}");
        assert!(of("userFile: /u, passwordFile: /p").is_ok());
    }

    #[test]
    fn files_are_read_anew_and_named_when_they_are_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let login = Login::Token(Secret::File(path.clone()));
        let error = login.auth(b"").err().expect("refused");
        assert!(error.contains("token") && error.contains("No such file"), "{error}");
        for text in ["one\n", "two"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(login.auth(b"").unwrap().token.as_deref(), Some(text.trim()));
        }
        std::fs::write(&path, "\n").unwrap();
        assert!(login.auth(b"").err().expect("refused").contains("empty"));
        std::fs::write(&path, vec![b'x'; 65 << 10]).unwrap();
        assert!(login.auth(b"").err().expect("refused").contains("65536"));
    }

    #[test]
    fn keys_sign_and_ended_tokens_are_told() {
        let key = KeyPair::new_user();
        let seed = key.seed().unwrap();
        let nkey = Login::Nkey(secret(&format!("# an nkey\n{seed}\n")));
        let auth = nkey.auth(b"nonce").unwrap();
        assert_eq!(auth.nkey, Some(key.public_key()));
        key.verify(b"nonce", &auth.signature.unwrap()).unwrap();
        assert!(Login::Nkey(secret("SUnone")).auth(b"").err().expect("refused").contains("nkey seed"));

        let claims = BASE64URL_NOPAD.encode(br#"{"exp": 1000}"#);
        let creds = format!(
            "-----BEGIN NATS USER JWT-----\nhead.{claims}.signature\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        let login = Login::Jwt(secret(&creds));
        assert_eq!(login.auth(b"").unwrap().jwt, Some(format!("head.{claims}.signature")));
        let at = |seconds| login.ended(OffsetDateTime::from_unix_timestamp(seconds).unwrap());
        assert_eq!(at(999), None);
        assert!(at(1000).unwrap().contains("1970-01-01T00:16:40Z"));
        assert!(Login::Jwt(secret(&seed)).auth(b"").is_err());
    }
}
