//! Steps that were captured as graphs.
//!
//! A graph is kept by everything that is baked into it: the padded number of rows and the commands themselves. It is
//! captured when it is first needed, from the same launches that would otherwise run one by one.

use cudarc::driver::{CudaGraph, sys};

use super::device::{CudaDevice, DeviceError};
use super::step::StepCommand;

/// Graphs of one size can differ in how they sample.
const VARIANTS_MAX: usize = 4;

/// A captured step.
struct Captured {
    rows: usize,
    commands: Vec<StepCommand>,
    graph: CudaGraph,
}

/// All captured steps.
#[derive(Default)]
pub struct Graphs {
    captured: Vec<Captured>,
}

// SAFETY: graphs are used by the one thread that owns the device.
unsafe impl Send for Graphs {}

impl std::fmt::Debug for Graphs {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Graphs({})", self.captured.len())
    }
}

/// Captures what `queue` launches.
///
/// # Errors
/// When the driver refuses the capture or `queue` fails.
pub fn capture(
    device: &CudaDevice,
    queue: impl FnOnce() -> Result<(), DeviceError>,
) -> Result<CudaGraph, DeviceError> {
    let stream = device.stream();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let queued = queue();
    let ended = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    queued?;
    let graph = ended?.ok_or_else(|| DeviceError::Call("a capture gave no graph".into()))?;
    graph.upload()?;
    Ok(graph)
}

impl Graphs {
    /// Queues the graph of these commands, captured from `queue` if it is new.
    ///
    /// # Errors
    /// When the driver refuses the capture or the launch.
    pub fn launch(
        &mut self,
        device: &CudaDevice,
        (rows, commands): (usize, &[StepCommand]),
        queue: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        if let Some(captured) = self.captured.iter().find(|c| c.rows == rows && c.commands == commands) {
            return Ok(captured.graph.launch()?);
        }
        let graph = capture(device, queue)?;
        graph.launch()?;
        // A model that changes its commands would fill the list; the oldest graph of the size goes.
        if self.captured.iter().filter(|c| c.rows == rows).count() >= VARIANTS_MAX {
            device.synchronize()?;
            let oldest = self.captured.iter().position(|c| c.rows == rows).expect("one was counted");
            self.captured.remove(oldest);
        }
        self.captured.push(Captured { rows, commands: commands.to_vec(), graph });
        Ok(())
    }
}
