//! Times the kernels of matrix products on a GPU: `cargo run --release -p millrace-kernels --example products
//! [ROWS...]` prints, for the products of two models, each kernel's time, and marks the one that a step takes. The
//! floor is the time to read the matrix, or to multiply, at 3,050 GB/s and 800 TFLOP/s.

use millrace_kernels::cuda::{Cuda, CudaOptions, Epilogue, TimedProduct};

const ROWS: [usize; 18] = [1, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 512, 2048, 8192];
/// Name, how sums leave, features, columns, whether heads are normed.
const PRODUCTS: [(&str, Epilogue, usize, usize, bool); 10] = [
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let asked: Vec<usize> = std::env::args().skip(1).map(|rows| rows.parse()).collect::<Result<_, _>>()?;
    let rows = if asked.is_empty() { ROWS.to_vec() } else { asked };
    let cuda = Cuda::new(CudaOptions::new(0))?;
    for (name, epilogue, features, columns, head_norms) in PRODUCTS {
        let several = if epilogue == Epilogue::Add { &[Some(1), Some(2), Some(4)][..] } else { &[None] };
        for &rows in &rows {
            if epilogue == Epilogue::Values && rows > 512 {
                continue;
            }
            let bytes = (features * columns * 2) as f64 / 3050e3;
            let floor = bytes.max(2.0 * (rows * features * columns) as f64 / 800e6);
            print!("{name:13}{rows:5} floor {floor:7.1}");
            for &splits in several {
                let product =
                    TimedProduct { epilogue, rows, matrix: (features, columns), splits, head_norms };
                if let Some(splits) = splits {
                    print!(" |{splits}");
                }
                for time in cuda.time_products(&product)? {
                    let mark = if time.chosen { "*" } else { "" };
                    print!("  {}{mark} {:.1}", time.kernel, time.microseconds);
                }
            }
            println!();
        }
    }
    Ok(())
}
