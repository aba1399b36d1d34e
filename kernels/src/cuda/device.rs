//! A CUDA device: its context, one stream, memory, and launching kernels.
//!
//! The driver's library is loaded at run time; where it is missing, opening a device is an error like any other.
//! All work goes through one non-blocking stream, without event tracking. Every call's result is checked. Memory
//! is taken at start; nothing here allocates during a step.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::modules::{MODULES, Module};

/// Why a device cannot be used, or a call on it failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The driver's library is not there.
    #[error("this machine has no CUDA driver (libcuda.so.1 cannot be loaded)")]
    NoDriver,
    /// The build had no CUDA compiler.
    #[error("this program was built without CUDA kernels: run scripts/cuda and build again")]
    NoKernels,
    /// There is no device with this number.
    #[error("device {index} does not exist; the driver knows {count}")]
    NoDevice {
        /// The number asked for.
        index: usize,
        /// Devices that there are.
        count: usize,
    },
    /// The chip is too old.
    #[error("the device has compute capability {major}.{minor}; 8.0 is needed")]
    Capability {
        /// Major number.
        major: i32,
        /// Minor number.
        minor: i32,
    },
    /// A block of the chip has too little shared memory for attention.
    #[error(
        "a block of the device can have {} KiB of shared memory; attention needs {} KiB, which the known chips from \
         compute capability 8.0 on have",
        has / 1024, needed / 1024
    )]
    Shared {
        /// Bytes that there are.
        has: u32,
        /// Bytes that are needed.
        needed: u32,
    },
    /// A call failed.
    #[error("CUDA: {0}")]
    Call(String),
}

impl From<DriverError> for DeviceError {
    fn from(error: DriverError) -> Self {
        DeviceError::Call(error.to_string())
    }
}

/// A kernel that was loaded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kernel(sys::CUfunction);

// SAFETY: a handle that the driver lets any thread use; its module is never unloaded.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// Where and how a kernel runs.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads per block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// Blocks along x that form a cluster; 1 is none.
    pub cluster: u32,
    /// Whether the kernel itself waits for the one before, so that it may start early.
    pub overlaps: bool,
}

impl Launch {
    /// One-dimensional blocks on a grid, which wait for their predecessor themselves.
    pub fn grid(grid: [u32; 3], threads: u32) -> Self {
        Self { grid, threads, shared_bytes: 0, cluster: 1, overlaps: true }
    }
}

/// An open device.
pub struct CudaDevice {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    loaded: Loaded,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most bytes of shared memory that a block can have.
    pub shared_bytes_max: u32,
    /// Bytes per second that memory is clocked for.
    pub memory_bytes_per_s: f64,
    /// Whether kernels for sm_90a run.
    pub hopper: bool,
    /// The device's name.
    pub name: String,
}

impl std::fmt::Debug for CudaDevice {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Device({})", self.name)
    }
}

/// Whether a device could be opened: kernels are built in and a driver with a device is there.
pub fn is_present() -> bool {
    // SAFETY: loading the driver's library runs its initialisers, as every CUDA program does.
    !MODULES.is_empty()
        && unsafe { sys::is_culib_present() }
        && result::init().is_ok()
        && CudaContext::device_count().is_ok_and(|count| count > 0)
}

impl CudaDevice {
    /// Opens a device by its number.
    ///
    /// # Errors
    /// When driver, device or kernels are missing, or the chip is too old.
    pub fn open(index: usize) -> Result<Arc<Self>, DeviceError> {
        if MODULES.is_empty() {
            return Err(DeviceError::NoKernels);
        }
        // SAFETY: loading the driver's library runs its initialisers, as every CUDA program does.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver);
        }
        result::init()?;
        let count = CudaContext::device_count()?.max(0) as usize;
        if index >= count {
            return Err(DeviceError::NoDevice { index, count });
        }
        let context = CudaContext::new(index)?;
        // SAFETY: everything runs on one stream in order, so that no event is needed for it.
        unsafe { context.disable_event_tracking() };
        let (major, minor) = context.compute_capability()?;
        if major < 8 {
            return Err(DeviceError::Capability { major, minor });
        }
        let attribute = |attribute| context.attribute(attribute).map(|value| value.max(0) as u32);
        let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_bytes_max =
            attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let memory_khz = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bus_bits = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
        // Two transfers per clock.
        let memory_bytes_per_s = f64::from(memory_khz) * 1e3 * 2.0 * f64::from(bus_bits) / 8.0;
        // A driver that is told to compile PTX has that of sm_80 alone.
        let from_ptx = std::env::var_os("CUDA_FORCE_PTX_JIT").is_some_and(|value| value == "1");
        let hopper = (major, minor) == (9, 0) && !from_ptx;
        let stream = context.new_stream()?;
        let name = context.name()?;
        let device = Self {
            context,
            stream,
            loaded: Loaded::default(),
            multiprocessors,
            shared_bytes_max,
            memory_bytes_per_s,
            hopper,
            name,
        };
        Ok(Arc::new(device))
    }

    /// The kernel of this name. The first of a module loads it: a driver that compiles takes its time, and no chip
    /// needs all of them.
    ///
    /// # Errors
    /// When no module has it, or the driver refuses the module.
    pub fn kernel(&self, name: &str) -> Result<Kernel, DeviceError> {
        self.bind()?;
        self.loaded.kernel(name)
    }

    /// Lets a kernel take this much dynamic shared memory.
    ///
    /// # Errors
    /// When the chip has less.
    pub fn allow_shared(&self, kernel: Kernel, bytes: u32) -> Result<(), DeviceError> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the handle is of a module that is never unloaded.
        Ok(unsafe { result::function::set_function_attribute(kernel.0, attribute, bytes as i32) }?)
    }

    /// Makes the device current for the calling thread.
    ///
    /// # Errors
    /// When the context is broken.
    pub fn bind(&self) -> Result<(), DeviceError> {
        Ok(self.context.bind_to_thread()?)
    }

    /// The stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Waits until all queued work has ended.
    ///
    /// # Errors
    /// When some of it failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(self.stream.synchronize()?)
    }

    /// Free and total bytes of the device's memory.
    ///
    /// # Errors
    /// When the context is broken.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        Ok(self.context.mem_get_info()?)
    }

    /// Queues a kernel. `arguments` are those of its signature, in order.
    ///
    /// # Errors
    /// When the driver refuses it.
    ///
    /// # Safety
    /// The arguments must be those that the kernel declares, and what they point to must outlive its run.
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError> {
        // SAFETY: a zeroed attribute is a valid one of kind "ignore".
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if launch.overlaps && self.hopper {
            let kind = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].id = kind;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if launch.cluster > 1 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            let dimensions =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
            attributes[count].value.clusterDim = dimensions;
            count += 1;
        }
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        // SAFETY: the caller vouches for the arguments; the attributes outlive the call.
        let code =
            unsafe { sys::cuLaunchKernelEx(&config, kernel.0, arguments.as_mut_ptr(), std::ptr::null_mut()) };
        Ok(code.result()?)
    }
}

/// The modules that kernels were asked of, by their places in [`MODULES`], and the place of each kernel's.
struct Loaded {
    places: HashMap<String, usize>,
    modules: Mutex<HashMap<usize, LoadedModule>>,
}

#[derive(Clone, Copy)]
struct LoadedModule(sys::CUmodule);

// SAFETY: a handle that the driver lets any thread use; the module is never unloaded.
unsafe impl Send for LoadedModule {}

impl Default for Loaded {
    fn default() -> Self {
        let names = |(place, module): (usize, &Module)| {
            let kernels = super::modules::resources(module.report).into_iter();
            kernels.map(move |resources| (resources.kernel, place)).collect::<Vec<_>>()
        };
        let places = MODULES.iter().enumerate().flat_map(names).collect();
        Self { places, modules: Mutex::default() }
    }
}

impl Loaded {
    fn kernel(&self, name: &str) -> Result<Kernel, DeviceError> {
        let missing = || DeviceError::Call(format!("no module holds the kernel {name}"));
        let place = *self.places.get(name).ok_or_else(missing)?;
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.get(&place) {
            Some(&module) => module,
            None => {
                // SAFETY: the image is a fat binary that nvcc wrote; it is never unloaded.
                let handle = unsafe { result::module::load_data(MODULES[place].image.as_ptr().cast()) }?;
                *modules.entry(place).or_insert(LoadedModule(handle))
            }
        };
        let name = CString::new(name).expect("a kernel's name has no zero byte");
        // SAFETY: the module is loaded.
        Ok(Kernel(unsafe { result::module::get_function(module.0, name) }?))
    }
}

/// Memory on the device, zeroed when taken.
#[derive(Debug)]
pub struct DeviceMemory {
    device: Arc<CudaDevice>,
    pointer: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceMemory {
    /// Takes memory; at least one byte.
    ///
    /// # Errors
    /// When the device has no more; the error says how much was asked for.
    pub fn zeroed(device: &Arc<CudaDevice>, bytes: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: the context is current.
        let pointer = unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            let (free, total) = device.memory().unwrap_or((0, 0));
            DeviceError::Call(format!("{bytes} bytes wanted, {free} of {total} are free: {error}"))
        })?;
        let memory = Self { device: device.clone(), pointer, bytes };
        // SAFETY: the memory is this large; all that follows is queued on the same stream.
        unsafe { result::memset_d8_async(pointer, 0, bytes, device.stream.cu_stream()) }?;
        Ok(memory)
    }

    /// Where it begins.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Queues a copy of pinned bytes to an offset.
    ///
    /// # Errors
    /// When the driver refuses it.
    ///
    /// # Safety
    /// The source must stay unchanged until the copy has ended.
    pub unsafe fn upload(&self, offset: usize, source: &[u8]) -> Result<(), DeviceError> {
        assert!(offset + source.len() <= self.bytes, "an upload stays inside of its memory");
        let stream = self.device.stream.cu_stream();
        // SAFETY: the range was checked; the caller keeps the source.
        Ok(unsafe { result::memcpy_htod_async(self.pointer + offset as u64, source, stream) }?)
    }

    /// Queues a copy of another range of the same length.
    ///
    /// # Errors
    /// When the driver refuses it.
    pub fn copy_from(&self, other: &DeviceMemory) -> Result<(), DeviceError> {
        assert_eq!(self.bytes, other.bytes, "ranges of one length");
        let stream = self.device.stream.cu_stream();
        // SAFETY: both ranges hold as many bytes, and two allocations never overlap.
        Ok(unsafe { result::memcpy_dtod_async(self.pointer, other.pointer, self.bytes, stream) }?)
    }

    /// Fills the memory with random bf16 numbers of about unit size, and waits.
    ///
    /// # Errors
    /// When the driver refuses it.
    pub fn fill_random(&self) -> Result<(), DeviceError> {
        const BYTES: usize = 1 << 20;
        let mut pinned = Pinned::zeroed(&self.device, BYTES)?;
        let mut state = 1_u32;
        for word in pinned.words_mut() {
            // A linear congruence (Numerical Recipes); signs, 7 bits of fraction and one of exponent are random.
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *word = (state & 0x80ff_80ff) | 0x3f00_3f00;
        }
        for offset in (0..self.bytes).step_by(BYTES) {
            let bytes = BYTES.min(self.bytes - offset);
            // SAFETY: the source is not written before the wait below.
            unsafe { self.upload(offset, &pinned.as_slice()[..bytes]) }?;
        }
        self.device.synchronize()
    }

    /// Copies from an offset and waits for all queued work.
    ///
    /// # Errors
    /// When the driver refuses it or queued work failed.
    pub fn download(&self, offset: usize, target: &mut [u8]) -> Result<(), DeviceError> {
        assert!(offset + target.len() <= self.bytes, "a download stays inside of its memory");
        self.device.bind()?;
        self.device.synchronize()?;
        // SAFETY: the range was checked.
        Ok(unsafe { result::memcpy_dtoh_sync(target, self.pointer + offset as u64) }?)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: taken in `zeroed`; freeing waits for the work that uses it. A failure has no one to hear it.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

/// Page-locked memory of the host, which the device reads and writes by itself.
#[derive(Debug)]
pub struct Pinned {
    device: Arc<CudaDevice>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: it owns its memory alone.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Takes memory, zeroed.
    ///
    /// # Errors
    /// When the system has no more to lock.
    pub fn zeroed(device: &Arc<CudaDevice>, bytes: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: the context is current; the memory is initialised before anyone reads it.
        let pointer = unsafe { result::malloc_host(bytes, 0) }?.cast::<u8>();
        // SAFETY: taken with this length a moment ago.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Self { device: device.clone(), pointer, bytes })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised memory of this length that lives as long as self.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    /// The bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }

    /// The whole words, to read.
    pub fn words(&self) -> &[u32] {
        // SAFETY: as above; the driver aligns to pages, and every bit pattern is a number.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.bytes / 4) }
    }

    /// The whole words, to write.
    pub fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above, and self is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes / 4) }
    }

    /// Queues a copy from the device into the first bytes.
    ///
    /// # Errors
    /// When the driver refuses it.
    ///
    /// # Safety
    /// Nobody may touch the bytes until the copy has ended.
    pub unsafe fn queue_download(&mut self, source: u64, bytes: usize) -> Result<(), DeviceError> {
        assert!(bytes <= self.bytes, "a download stays inside of its memory");
        let stream = self.device.stream.cu_stream();
        let target = &mut self.as_mut_slice()[..bytes];
        // SAFETY: the caller keeps away from the bytes; the source holds as many.
        Ok(unsafe { result::memcpy_dtoh_async(target, source, stream) }?)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: taken in `zeroed`. A failure has no one to hear it.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}

/// The addresses of a kernel's arguments, in the order of its signature.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        &mut [$((&raw const $argument).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(super) use arguments;
