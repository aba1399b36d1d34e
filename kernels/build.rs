//! Compiles the CUDA kernels for the feature `cuda` where there is a compiler, so that the crate builds with and
//! without one.
//!
//! The compiler is the one that `NVCC` names, that of the `PATH`, or that of the cache that `scripts/cuda` fills.
//! Each `cuda/*.cu` becomes a fat binary for sm_80 (with PTX for later chips) and sm_90a; a generated file lists
//! them. Beside each binary lies ptxas's report, which the tests read for spills. Without a compiler the list is
//! empty, and the device says so at run time. A compiler that is there and fails, fails the build.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use std::{env, fs};

const TARGETS: [&str; 2] =
    ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"];

fn main() {
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-env-changed=NVCC");
    println!("cargo:rerun-if-env-changed=MILLRACE_CACHE");
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut list = String::from("&[\n");
    if let Some(nvcc) = compiler() {
        println!("cargo:rerun-if-changed={}", nvcc.display());
        let (sources, headers) = sources();
        let newest_header = headers.iter().map(|path| modified(path)).max();
        for source in sources {
            let name = source.file_stem().expect("a file has a name").to_string_lossy().into_owned();
            let binary = out.join(format!("{name}.fatbin"));
            let newest = newest_header.max(Some(modified(&source))).max(Some(modified(&nvcc)));
            if !binary.is_file() || Some(modified(&binary)) < newest {
                compile(&nvcc, &source, &binary);
            }
            list += &format!(
                "    Module {{ name: {name:?}, image: include_bytes!({binary:?}), report: include_str!({:?}) }},\n",
                binary.with_extension("report"),
            );
        }
    }
    list += "]\n";
    fs::write(out.join("modules.rs"), list).expect("the list of modules is written");
}

fn compiler() -> Option<PathBuf> {
    if let Some(named) = env::var_os("NVCC") {
        return Some(named.into());
    }
    let cache = env::var_os("MILLRACE_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache/millrace")));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
    on_path.chain(cache.map(|cache| cache.join("cuda/bin/nvcc"))).find(|nvcc| nvcc.is_file())
}

/// The kernels' sources and the headers that they include.
fn sources() -> (Vec<PathBuf>, Vec<PathBuf>) {
    let folder = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("cuda");
    let entries = fs::read_dir(&folder).expect("the folder of the kernels");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    let of = |extension: &str| {
        files.iter().filter(|path| path.extension().is_some_and(|e| e == extension)).cloned().collect()
    };
    (of("cu"), of("cuh"))
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn compile(nvcc: &Path, source: &Path, binary: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-lineinfo", "-fatbin", "-Xptxas", "-v"]).args(TARGETS);
    let output = command.arg(source).arg("-o").arg(binary).output().expect("nvcc runs");
    let report = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "nvcc {}:\n{report}", source.display());
    fs::write(binary.with_extension("report"), report).expect("the report is written");
}
