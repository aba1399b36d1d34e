//! What the device could do at best, measured on the spot.
//!
//! Bandwidth is that of a copy inside of the device's memory, counting what is read and what is written. The rate of
//! products is that of the widest one here, on random numbers: zeros would take less power and be faster.

use std::time::Instant;

use super::Cuda;
use super::device::{DeviceError, DeviceMemory, arguments};
use super::gemm::{BatchMap, ProductSize};
use super::output::{Epilogue, Output};
use super::weights::tensor_map;
use crate::bounds::Bounds;

const COPY_BYTES: usize = 1 << 30;
const COPIES: u32 = 20;
const PRODUCT: usize = 8192;
const PRODUCTS: u32 = 10;

impl Cuda {
    /// Measures bandwidth and rate. Takes about 3 GB for the time.
    ///
    /// # Errors
    /// When the device has too little memory or failed.
    pub fn measure(&self) -> Result<Bounds, DeviceError> {
        self.device.bind()?;
        Ok(Bounds { read_bytes_per_s: self.measure_copy()?, operations_per_s: self.measure_product()? })
    }

    fn measure_copy(&self) -> Result<f64, DeviceError> {
        let device = &self.device;
        let (from, to) =
            (DeviceMemory::zeroed(device, COPY_BYTES)?, DeviceMemory::zeroed(device, COPY_BYTES)?);
        to.copy_from(&from)?;
        device.synchronize()?;
        let begun = Instant::now();
        for _ in 0..COPIES {
            to.copy_from(&from)?;
        }
        device.synchronize()?;
        Ok(2.0 * COPY_BYTES as f64 * f64::from(COPIES) / begun.elapsed().as_secs_f64())
    }

    fn measure_product(&self) -> Result<f64, DeviceError> {
        let device = &self.device;
        let bytes = PRODUCT * PRODUCT * 2;
        let operands = DeviceMemory::zeroed(device, bytes)?;
        let out = DeviceMemory::zeroed(device, 2 * bytes)?;
        operands.fill_random()?;
        let rows = |count| tensor_map(operands.pointer(), (PRODUCT, PRODUCT), PRODUCT, count);
        let work = ProductSize::new(Epilogue::Values, PRODUCT, (PRODUCT, PRODUCT));
        let choice = self.gemm.choose(&work);
        let size = PRODUCT as i32;
        let output = choice.output(&work, Output { out: out.pointer(), stride: size, ..Output::default() });
        let queue = || -> Result<(), DeviceError> {
            let (pointer, launch) = (operands.pointer(), choice.launch);
            // SAFETY: the arguments are those that the kernels declare; their memory lives until the work has ended.
            unsafe {
                match choice.map {
                    BatchMap::None => {
                        device.launch(choice.kernel, launch, arguments![pointer, size, pointer, size, output])
                    }
                    _ => {
                        let (matrix, batch) = (rows(64)?, rows(32)?);
                        device.launch(choice.kernel, launch, arguments![matrix, batch, output])
                    }
                }
            }
        };
        queue()?;
        device.synchronize()?;
        let begun = Instant::now();
        for _ in 0..PRODUCTS {
            queue()?;
        }
        device.synchronize()?;
        let operations = 2.0 * (PRODUCT as f64).powi(3) * f64::from(PRODUCTS);
        Ok(operations / begun.elapsed().as_secs_f64())
    }
}
