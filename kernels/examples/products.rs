//! The kernels of matrix products on a GPU, for the products of two models: `cargo run --release -p millrace-kernels
//! --example products [ROWS...]` prints each kernel's time in microseconds, marks the one that a step takes, and tells
//! how long the products of a layer take one after the other. The floor is the time to read the matrix, or to multiply,
//! at what the machine is first measured to do. With `check` before the rows it compares what the kernels leave, byte
//! for byte, over all these numbers of rows; it fails if one differs.

use millrace_kernels::cuda::{Cuda, CudaOptions, Epilogue, TimedProduct};

type Failure = Box<dyn std::error::Error>;

const ROWS: [usize; 18] = [1, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 512, 2048, 8192];
/// Whole pages, since those are what the cache is compared by.
const ROWS_CHECKED: [usize; 7] = [576, 256, 224, 144, 96, 48, 16];
/// Most rows of products whose values are stored.
const ROWS_OF_VALUES: usize = 576;
/// How the names of each model's products begin.
const MODELS: [&str; 2] = ["0.6B", "8B"];

/// Name, how sums leave, features, columns, whether heads are normed.
type Product = (&'static str, Epilogue, usize, usize, bool);

/// A layer's products of each model, in their order, and its head.
const PRODUCTS: [Product; 10] = [
    ("0.6B qkv", Epilogue::Rope, 4096, 1024, true),
    ("0.6B o", Epilogue::Add, 1024, 2048, false),
    ("0.6B gate-up", Epilogue::SiluMul, 6144, 1024, false),
    ("0.6B down", Epilogue::Add, 1024, 3072, false),
    ("0.6B head", Epilogue::Values, 151_936, 1024, false),
    ("8B qkv", Epilogue::Rope, 6144, 4096, false),
    ("8B o", Epilogue::Add, 4096, 4096, false),
    ("8B gate-up", Epilogue::SiluMul, 28_672, 4096, false),
    ("8B down", Epilogue::Add, 4096, 14_336, false),
    ("8B head", Epilogue::Values, 128_256, 4096, false),
];

/// Checked in place of the heads, whose results are hundreds of megabytes.
const VALUES_CHECKED: (usize, usize) = (6144, 1024);

fn products(rows: usize) -> impl Iterator<Item = (&'static str, TimedProduct)> {
    let all = PRODUCTS.iter().filter(move |p| p.1 != Epilogue::Values || rows <= ROWS_OF_VALUES);
    all.map(move |product| (product.0, timed(product, rows)))
}

fn timed(&(_, epilogue, features, columns, head_norms): &Product, rows: usize) -> TimedProduct {
    TimedProduct { epilogue, rows, matrix: (features, columns), head_norms }
}

fn time(cuda: &Cuda, rows: &[usize]) -> Result<(), Failure> {
    let bounds = cuda.measure()?;
    let (read, multiply) = (bounds.read_bytes_per_s, bounds.operations_per_s);
    println!("copies {:.0} GB/s, multiplies {:.0} TFLOP/s", read / 1e9, multiply / 1e12);
    for &rows in rows {
        for (name, product) in products(rows) {
            let elements = (product.matrix.0 * product.matrix.1) as f64;
            let floor = (2.0 * elements / read).max(2.0 * rows as f64 * elements / multiply) * 1e6;
            print!("{name:13}{rows:5} floor {floor:7.1}");
            for time in cuda.time_products(&product)? {
                let mark = if time.chosen { "*" } else { "" };
                print!("  {}{mark} {:.1}", time.kernel, time.microseconds);
            }
            println!();
        }
        for model in MODELS {
            let layer = PRODUCTS.iter().filter(|p| p.0.starts_with(model) && p.1 != Epilogue::Values);
            let layer: Vec<_> = layer.map(|p| timed(p, rows)).collect();
            println!("{:13}{rows:5} in a chain {:.1}", format!("{model} layer"), cuda.time_chain(&layer)?);
        }
    }
    Ok(())
}

/// Compares all kernels at all numbers of rows with the first kernel at the most rows.
fn check(cuda: &Cuda, rows: &[usize]) -> Result<(), Failure> {
    let most = rows.iter().copied().max().unwrap_or(0);
    let (mut compared, mut differing) = (0, 0);
    for (name, mut product) in products(most) {
        if product.epilogue == Epilogue::Values {
            product.matrix = VALUES_CHECKED;
        }
        let mut known: Option<Vec<Vec<u8>>> = None;
        let mut sizes = rows.to_vec();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        for rows in sizes {
            for found in cuda.product_results(&TimedProduct { rows, ..product })? {
                let known = known.get_or_insert_with(|| found.results.clone());
                for (part, (found_bytes, known)) in found.results.iter().zip(known).enumerate() {
                    let wrong = found_bytes.iter().zip(known.iter()).filter(|(a, b)| a != b).count();
                    compared += 1;
                    if wrong > 0 {
                        differing += 1;
                        println!("{name} {rows} rows {} result {part}: {wrong} bytes differ", found.kernel);
                    }
                }
            }
        }
    }
    println!("{compared} results compared, {differing} differ");
    if differing > 0 { Err("results depend on the kernel".into()) } else { Ok(()) }
}

fn main() -> Result<(), Failure> {
    let mut asked: Vec<String> = std::env::args().skip(1).collect();
    let checks = asked.first().is_some_and(|word| word == "check");
    asked.drain(..usize::from(checks));
    let rows: Vec<usize> = asked.iter().map(|rows| rows.parse()).collect::<Result<_, _>>()?;
    let cuda = Cuda::new(CudaOptions::new(0))?;
    match (checks, rows.is_empty()) {
        (true, true) => check(&cuda, &ROWS_CHECKED),
        (true, false) => check(&cuda, &rows),
        (false, true) => time(&cuda, &ROWS),
        (false, false) => time(&cuda, &rows),
    }
}
