//! How long a step keeps the device busy, from the upload of its plan to the download of its results.

use std::time::Duration;

use cudarc::driver::{CudaEvent, sys};

use super::device::{Device, DeviceError};

/// The start and the end of the last step, as the device saw them.
#[derive(Debug)]
pub struct StepClock {
    begun: CudaEvent,
    ended: CudaEvent,
    stopped: bool,
}

impl StepClock {
    /// Makes the events.
    ///
    /// # Errors
    /// When the driver refuses them.
    pub fn new(device: &Device) -> Result<Self, DeviceError> {
        let event = || device.stream().context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Self { begun: event()?, ended: event()?, stopped: false })
    }

    /// A step is about to be queued.
    ///
    /// # Errors
    /// When the driver refuses it.
    pub fn start(&mut self, device: &Device) -> Result<(), DeviceError> {
        self.stopped = false;
        Ok(self.begun.record(device.stream())?)
    }

    /// A step has been queued.
    ///
    /// # Errors
    /// When the driver refuses it.
    pub fn stop(&mut self, device: &Device) -> Result<(), DeviceError> {
        self.ended.record(device.stream())?;
        self.stopped = true;
        Ok(())
    }

    /// What the last step took; none before the first one has ended.
    pub fn elapsed(&self) -> Option<Duration> {
        let milliseconds = self.stopped.then(|| self.begun.elapsed_ms(&self.ended).ok())??;
        Some(Duration::from_secs_f32(milliseconds.max(0.0) / 1e3))
    }
}
