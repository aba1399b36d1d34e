//! An NVIDIA GPU as the engine's device. A build without the feature `cuda` sees none and refuses one.

use millrace_kernels::bounds::Bounds;

use super::{Engine, Setup, StartError};

#[cfg(feature = "cuda")]
mod with_cuda {
    use millrace_crds::config::{Dtype, Quantization};
    use millrace_kernels::cpu::Precision;
    use millrace_kernels::cuda::{Cuda, CudaOptions, KernelSet};

    use super::super::{Hardware, refuse};
    use super::*;

    impl Setup<'_> {
        pub fn on_gpu(self) -> Result<Engine, StartError> {
            let quantization = match self.config.quantization {
                Quantization::None => None,
                Quantization::Int8 => Some("int8"),
                Quantization::Int4 => Some("int4"),
                Quantization::Fp8 => Some("fp8"),
            };
            if let Some(quantization) = quantization {
                return refuse("quantization", quantization, "none on a GPU");
            }
            if self.config.dtype == Dtype::F32 {
                return refuse("dtype", "f32", "auto or bf16 on a GPU");
            }
            let index = self.config.device_index as usize;
            let kernels = if self.tuning.small_gpu { KernelSet::Small } else { KernelSet::Own };
            let ops = Cuda::new(CudaOptions { index, kernels, graphs: self.tuning.graphs })?;
            let hardware = Hardware::Cuda { index, name: ops.name().to_owned() };
            self.run(ops, (Precision::Bf16, hardware), |ops| ops.free_bytes().ok().map(|bytes| bytes as u64))
        }
    }

    pub fn is_present() -> bool {
        millrace_kernels::cuda::is_present()
    }

    pub fn measure(index: usize) -> Result<Bounds, StartError> {
        Ok(Cuda::new(CudaOptions::new(index))?.measure()?)
    }
}

#[cfg(not(feature = "cuda"))]
mod without_cuda {
    use super::super::refuse;
    use super::*;

    pub fn is_present() -> bool {
        false
    }

    impl Setup<'_> {
        pub fn on_gpu(self) -> Result<Engine, StartError> {
            absent()
        }
    }

    pub fn measure(_index: usize) -> Result<Bounds, StartError> {
        absent()
    }

    fn absent<T>() -> Result<T, StartError> {
        refuse("device", "cuda", "auto or cpu: this program was built without the feature `cuda`")
    }
}

#[cfg(feature = "cuda")]
pub use with_cuda::{is_present, measure};
#[cfg(not(feature = "cuda"))]
pub use without_cuda::{is_present, measure};
