//! How much memory the process may still take: what the system has left, or its control group, if that is less.
//!
//! Unknown is not zero and not infinite: where neither can be read, the caller is told so.

use std::fs;

/// Control group without a limit, as version 1 writes it: the greatest page-aligned number.
const UNLIMITED_MIN: u64 = 1 << 62;

/// Bytes that may still be taken; `None` when the system does not say.
pub fn available_bytes() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    match (system, group_room()) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (system, group) => system.or(group),
    }
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// What the control group leaves, version 2 first.
fn group_room() -> Option<u64> {
    let files = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ];
    files.iter().find_map(|(limit, used)| {
        let limit = group_limit(&fs::read_to_string(limit).ok()?)?;
        let used: u64 = fs::read_to_string(used).ok()?.trim().parse().ok()?;
        Some(limit.saturating_sub(used))
    })
}

fn group_limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|&limit| limit < UNLIMITED_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_and_no_limit_is_none() {
        let meminfo = "MemTotal:  100 kB\nMemFree: 5 kB\nMemAvailable:     42 kB\n";
        assert_eq!(mem_available(meminfo), Some(42 * 1024));
        assert_eq!(mem_available("MemTotal: 100 kB\n"), None);
        assert_eq!(group_limit("max\n"), None);
        assert_eq!(group_limit("9223372036854771712\n"), None);
        assert_eq!(group_limit("1048576\n"), Some(1 << 20));
    }
}
