//! The jobs of a stream against what its consumers know of them. Pure.

/// A stream's count at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamCount {
    /// Messages in it.
    pub messages: u64,
    /// The last sequence that was given.
    pub last_sequence: u64,
}

/// Jobs that no consumer will deliver: those in the stream that no consumer counts as pending or unacknowledged. A
/// consumer with a delivery limit of its own leaves such jobs behind, and shows them in no counter.
///
/// `known` is the sum of all consumers, read between the two counts of the stream. `None` if jobs came or went
/// meanwhile, so that the numbers are not of one moment.
pub fn undeliverable(before: StreamCount, after: StreamCount, known: u64) -> Option<u64> {
    (before == after).then(|| before.messages.saturating_sub(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_queue_at_rest_can_be_counted() {
        let count = |messages, last_sequence| StreamCount { messages, last_sequence };
        assert_eq!(undeliverable(count(5, 9), count(5, 9), 5), Some(0));
        assert_eq!(undeliverable(count(5, 9), count(5, 9), 2), Some(3));
        assert_eq!(undeliverable(count(5, 9), count(4, 9), 4), None, "one was finished");
        assert_eq!(undeliverable(count(5, 9), count(5, 10), 4), None, "one was finished and one came");
    }
}
