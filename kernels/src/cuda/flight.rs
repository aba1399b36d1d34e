//! The host's side of steps in flight: memory that the device reads and writes by itself, and when it was busy.
//!
//! Two sides take turns, so that the host writes a step while the device runs the one before.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaEvent, sys};

use super::device::{CudaDevice, DeviceError, Pinned};
use crate::ops::QUEUED_MAX;

/// The host's side of one step.
#[derive(Debug)]
pub struct Flight {
    /// What the step uploads.
    pub staging: Pinned,
    /// Adjustments on their way.
    pub adjustments: Pinned,
    /// Results of sampling.
    pub results: Pinned,
    /// Log probabilities that each sampled row wants.
    pub logprobs: Vec<Option<u32>>,
    begun: CudaEvent,
    ended: CudaEvent,
}

/// Bytes of a side's parts.
#[derive(Debug, Clone, Copy)]
pub struct FlightBytes {
    /// Of [`Flight::staging`].
    pub staging: usize,
    /// Of [`Flight::adjustments`].
    pub adjustments: usize,
    /// Of [`Flight::results`].
    pub results: usize,
}

impl Flight {
    fn new(device: &Arc<CudaDevice>, bytes: FlightBytes) -> Result<Self, DeviceError> {
        let event = || device.stream().context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Self {
            staging: Pinned::zeroed(device, bytes.staging)?,
            adjustments: Pinned::zeroed(device, bytes.adjustments)?,
            results: Pinned::zeroed(device, bytes.results)?,
            logprobs: Vec::new(),
            begun: event()?,
            ended: event()?,
        })
    }

    /// Marks the place in the stream where the step begins.
    ///
    /// # Errors
    /// When the driver refuses it.
    pub fn begin(&self, device: &CudaDevice) -> Result<(), DeviceError> {
        Ok(self.begun.record(device.stream())?)
    }

    /// Waits until the step has ended; says how long it kept the device busy, from its first upload to the download
    /// of its results.
    ///
    /// # Errors
    /// When it failed.
    pub fn wait(&self) -> Result<Duration, DeviceError> {
        self.ended.synchronize()?;
        let milliseconds = self.begun.elapsed_ms(&self.ended)?;
        Ok(Duration::from_secs_f32(milliseconds.max(0.0) / 1e3))
    }
}

/// The sides of the steps that are queued, oldest first, and of the next one.
#[derive(Debug)]
pub struct Flights {
    sides: [Flight; QUEUED_MAX],
    queued: usize,
}

impl Flights {
    /// Takes the memory.
    ///
    /// # Errors
    /// When the system has no more to lock.
    pub fn new(device: &Arc<CudaDevice>, bytes: FlightBytes) -> Result<Self, DeviceError> {
        Ok(Self { sides: [Flight::new(device, bytes)?, Flight::new(device, bytes)?], queued: 0 })
    }

    /// The side of the step that is written next; the device does not use it.
    ///
    /// # Panics
    /// When as many steps are queued as may be.
    pub fn next(&self) -> &Flight {
        self.sides.get(self.queued).expect("a step is collected before a third one is queued")
    }

    /// As [`Self::next`], to write.
    ///
    /// # Panics
    /// As there.
    pub fn next_mut(&mut self) -> &mut Flight {
        self.sides.get_mut(self.queued).expect("a step is collected before a third one is queued")
    }

    /// The next step has been queued: its side is the device's until it has ended.
    ///
    /// # Errors
    /// When the driver refuses to mark its end.
    pub fn queued(&mut self, device: &CudaDevice) -> Result<(), DeviceError> {
        self.next().ended.record(device.stream())?;
        self.queued += 1;
        Ok(())
    }

    /// The oldest step's side.
    ///
    /// # Panics
    /// When none is queued.
    pub fn oldest(&self) -> &Flight {
        assert!(self.queued > 0, "a step is queued before it is collected");
        &self.sides[0]
    }

    /// The oldest step has ended and its results are read.
    pub fn collected(&mut self) {
        self.sides.rotate_left(1);
        self.queued -= 1;
    }
}
