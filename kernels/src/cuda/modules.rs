//! The compiled kernels, as the build script left them, and what ptxas said about each.
//!
//! The list is empty in a build without a CUDA compiler.

/// One source's kernels for all chips.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    /// The source's name.
    pub name: &'static str,
    /// A fat binary.
    pub image: &'static [u8],
    /// What ptxas reported.
    pub report: &'static str,
}

/// All kernels of this build.
pub const MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// What a kernel takes on one chip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelResources {
    /// The kernel.
    pub kernel: String,
    /// The chip, such as `sm_90a`.
    pub chip: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of static shared memory.
    pub shared_bytes: u32,
    /// Bytes that are written to local memory because registers ran out.
    pub spilled_bytes: u32,
}

/// Reads ptxas's report.
pub fn resources(report: &str) -> Vec<KernelResources> {
    let number_before = |line: &str, words: &str| -> u32 {
        let before = line.split(words).next().filter(|before| before.len() < line.len());
        before.and_then(|b| b.split_whitespace().last()).and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let mut found = Vec::new();
    let (mut kernel, mut chip, mut spilled) = (String::new(), String::new(), 0);
    for line in report.lines() {
        if line.contains("Compiling entry function") {
            let quoted: Vec<&str> = line.split('\'').collect();
            kernel = quoted.get(1).copied().unwrap_or_default().to_owned();
            chip = quoted.get(3).copied().unwrap_or_default().to_owned();
        } else if line.contains("bytes spill stores") {
            spilled = number_before(line, " bytes spill stores");
        } else if line.contains("registers") && line.contains("Used") {
            found.push(KernelResources {
                kernel: kernel.clone(),
                chip: chip.clone(),
                registers: number_before(line, " registers"),
                shared_bytes: number_before(line, " bytes smem"),
                spilled_bytes: spilled,
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let report = "ptxas info    : Compiling entry function 'embed' for 'sm_90a'\n\
                      ptxas info    : Function properties for embed\n    \
                      0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
                      ptxas info    : Used 24 registers, used 1 barriers, 64 bytes smem, 8 bytes cmem[2]\n";
        let expected = KernelResources {
            kernel: "embed".into(),
            chip: "sm_90a".into(),
            registers: 24,
            shared_bytes: 64,
            spilled_bytes: 8,
        };
        assert_eq!(resources(report), [expected]);
    }

    #[test]
    fn no_kernel_spills() {
        if MODULES.is_empty() {
            eprintln!("SKIPPED: this build has no CUDA kernels: run scripts/cuda");
            return;
        }
        let all: Vec<KernelResources> = MODULES.iter().flat_map(|module| resources(module.report)).collect();
        assert!(all.iter().filter(|kernel| kernel.chip == "sm_90a").count() > 20, "{all:?}");
        let spilling: Vec<&KernelResources> = all.iter().filter(|kernel| kernel.spilled_bytes > 0).collect();
        assert!(spilling.is_empty(), "{spilling:#?}");
    }

    /// ptxas runs a loop's wgmma one by one if it finds their sums defined by others in between, and only notes it.
    #[test]
    fn tensor_cores_do_not_wait_for_each_product() {
        let lines = MODULES.iter().flat_map(|module| module.report.lines());
        let serialized: Vec<&str> =
            lines.filter(|line| line.contains("wgmma") && line.contains("serialized")).collect();
        assert!(serialized.is_empty(), "{serialized:#?}");
    }
}
