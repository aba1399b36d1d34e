//! Converts a GGUF file into a model folder: `cargo run -p millrace-worker --example import -- FILE.gguf OUT`.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, bail};
use millrace_worker::import::{self, ImportOptions};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (gguf, out, dtype) = match arguments.as_slice() {
        [gguf, out] => (gguf, out, "bf16"),
        [gguf, out, dtype] => (gguf, out, dtype.as_str()),
        _ => bail!("usage: import FILE.gguf OUT [bf16|f16|f32]"),
    };
    let dtype = dtype.parse().map_err(anyhow::Error::msg)?;
    let started = Instant::now();
    let options = ImportOptions { dtype, ..ImportOptions::default() };
    let imported = import::run(Path::new(gguf), Path::new(out), &options).context("the import failed")?;
    println!("{imported:#?}\n{:.2} s", started.elapsed().as_secs_f64());
    Ok(())
}
