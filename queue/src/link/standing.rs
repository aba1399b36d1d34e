//! What is known of a connection that does not stand: why, and whether that is a refusal for good. Pure but for the
//! file of a JWT, whose end is told.

use std::time::Instant;

use async_nats::Server;
use time::OffsetDateTime;

use super::{REFUSED_FIRST, REFUSED_LATER};
use crate::login::Login;

/// What is known of a connection that does not stand.
#[derive(Debug, Default)]
pub(super) struct Standing {
    was_in: bool,
    refused_since: Option<Instant>,
    pub(super) trouble: Option<String>,
    pub(super) denied: Option<(Instant, String)>,
}

impl Standing {
    /// Looks at what each server said last, before the next attempt. Returns the reason once it is sure that none will
    /// let this process in.
    pub(super) fn look(&mut self, errors: &[String], now: Instant) -> Option<String> {
        if errors.is_empty() {
            return None;
        }
        let reason = errors.join("; ");
        self.trouble = Some(reason.clone());
        if !errors.iter().all(|error| is_refusal(error)) {
            self.refused_since = None;
            return None;
        }
        let since = *self.refused_since.get_or_insert(now);
        let patience = if self.was_in { REFUSED_LATER } else { REFUSED_FIRST };
        (now.saturating_duration_since(since) >= patience).then_some(reason)
    }

    /// Why, where the broker answers and lets nobody in.
    pub(super) fn refusal(&self) -> Option<String> {
        self.trouble.clone().filter(|_| self.refused_since.is_some())
    }

    /// It stands.
    pub(super) fn connected(&mut self) {
        *self = Self { was_in: true, denied: self.denied.take(), ..Self::default() };
    }
}

/// What each server said at the last attempt, by its host alone: an address may hold a password.
pub(super) fn errors(servers: &[Server], login: &Login) -> Vec<String> {
    let ended = || login.ended(OffsetDateTime::now_utc());
    let told = |server: &Server| {
        let error = server.last_error.as_ref()?;
        let reason = match ended().filter(|_| is_refusal(error)) {
            Some(ended) => format!("{error} ({ended})"),
            None => error.clone(),
        };
        Some(format!("{}:{}: {reason}", server.addr.host(), server.addr.port()))
    };
    servers.iter().filter_map(told).collect()
}

/// Whether another attempt with the same files would end the same way, by the words of the client library and of TLS.
fn is_refusal(error: &str) -> bool {
    const WORDS: [&str; 9] = [
        "authorization violation",
        "failed signing nonce",
        "invalid peer certificate",
        "alert: CertificateRequired",
        "alert: BadCertificate",
        "alert: UnknownCA",
        "alert: CertificateUnknown",
        "alert: CertificateExpired",
        "alert: CertificateRevoked",
    ];
    WORDS.iter().any(|words| error.contains(words))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_lasting_refusals_of_all_servers_end_the_process() {
        let (refusal, away) = ("a:1: authorization violation: x".to_owned(), "b:1: IO error: y".to_owned());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut standing = Standing::default();
        assert_eq!(standing.look(&[], at(0)), None);
        assert_eq!(standing.look(std::slice::from_ref(&refusal), at(0)), None);
        assert_eq!(standing.look(std::slice::from_ref(&refusal), at(14)), None);
        assert_eq!(standing.look(std::slice::from_ref(&refusal), at(15)), Some(refusal.clone()));
        // One server that is only away may still let it in.
        let mixed = [refusal.clone(), away.clone()];
        assert_eq!(standing.look(&mixed, at(16)), None);
        assert_eq!(standing.trouble, Some(mixed.join("; ")));
        assert_eq!(standing.look(std::slice::from_ref(&refusal), at(30)), None, "counted anew");
        standing.connected();
        assert_eq!(standing.trouble, None);
        assert_eq!(standing.look(std::slice::from_ref(&refusal), at(100)), None);
        assert_eq!(standing.look(std::slice::from_ref(&refusal), at(159)), None, "it was in before");
        assert_eq!(standing.look(std::slice::from_ref(&refusal), at(160)), Some(refusal));
    }
}
