//! How much memory this process holds, as the kernel counts it. Knows nothing of what uses it.

use std::fs;

/// Bytes resident now.
pub(super) fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// Most bytes resident since the start, or since the last [`forget_peak`].
pub(super) fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Begins a new peak. False where the kernel does not offer it; the peak then stays that of the whole process.
pub(super) fn forget_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn status(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_peak_is_seen() {
        forget_peak();
        let before = peak().expect("linux");
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak().expect("linux") >= before.min(resident().expect("linux")));
        assert!(peak().expect("linux") > 64 << 20);
        drop(block);
    }
}
