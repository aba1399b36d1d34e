//! Prints what each CUDA kernel takes on each chip: registers per thread, static shared memory, spilled bytes.
//!
//! Ends with an error when the build has no kernels or one spills.

use std::process::ExitCode;

use millrace_kernels::cuda::modules::{MODULES, resources};

fn main() -> ExitCode {
    if MODULES.is_empty() {
        eprintln!("this build has no CUDA kernels: run scripts/cuda and build again");
        return ExitCode::FAILURE;
    }
    let mut spilling = 0;
    println!(
        "{:<36} {:<7} {:>9} {:>12} {:>13}",
        "kernel", "chip", "registers", "shared bytes", "spilled bytes"
    );
    for module in MODULES {
        for kernel in resources(module.report) {
            println!(
                "{:<36} {:<7} {:>9} {:>12} {:>13}",
                kernel.kernel, kernel.chip, kernel.registers, kernel.shared_bytes, kernel.spilled_bytes
            );
            spilling += usize::from(kernel.spilled_bytes > 0);
        }
    }
    println!("{} bytes of binaries", MODULES.iter().map(|module| module.image.len()).sum::<usize>());
    if spilling > 0 {
        eprintln!("{spilling} kernels spill");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
