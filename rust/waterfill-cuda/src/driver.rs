//! The few driver calls that are needed. Those that cudarc has as results are called there, the others as they are.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::error::{Error, Result};
use crate::installed::require_driver;

/// The driver's refusal of the function `call`.
fn refused(call: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |DriverError(code)| Error::Driver { call, name: format!("{code:?}"), code: code as u32 }
}

/// A device's primary context, the one that torch uses too.
#[derive(Debug)]
pub(crate) struct Device {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: contexts may be used from any thread; nothing here is tied to the one that made it.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for Device {}

/// The device's context is the thread's own as long as this lives; `pushed` if another was before.
pub(crate) struct CurrentContext<'a> {
    pushed: bool,
    of: std::marker::PhantomData<&'a Device>,
}

impl Device {
    pub fn new(ordinal: usize) -> Result<Self> {
        // Before all others: cudarc panics where there is no driver. Every other call of this module is made for a device.
        require_driver()?;
        result::init().map_err(refused("cuInit"))?;
        let device = result::device::get(ordinal as i32).map_err(refused("cuDeviceGet"))?;
        // SAFETY: a device that the driver just gave.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(refused("cuDevicePrimaryCtxRetain"))?;
        Ok(Self { device, context })
    }

    pub fn current(&self) -> Result<CurrentContext<'_>> {
        // Nearly always it is torch's, and the same.
        let current = result::ctx::get_current().map_err(refused("cuCtxGetCurrent"))?;
        let pushed = current != Some(self.context);
        if pushed {
            // SAFETY: a context that lives as long as `self` retains it, which outlives what is returned.
            unsafe { sys::cuCtxPushCurrent_v2(self.context) }
                .result()
                .map_err(refused("cuCtxPushCurrent_v2"))?;
        }
        Ok(CurrentContext { pushed, of: std::marker::PhantomData })
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<usize> {
        // SAFETY: a device that the driver gave.
        let value = unsafe { result::device::get_attribute(self.device, attribute) }
            .map_err(refused("cuDeviceGetAttribute"))?;
        Ok(value.max(0) as usize)
    }

    /// Compute capability, `major * 10 + minor`.
    pub fn architecture(&self) -> Result<u32> {
        use sys::CUdevice_attribute as A;
        let major = self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok((major * 10 + minor) as u32)
    }

    /// Shared memory that a block can have, in bytes.
    pub fn shared_memory(&self) -> Result<usize> {
        self.attribute(
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A process that ends has lost its contexts already; nobody is left to be told.
        // SAFETY: it was retained once, by `new`, and nothing of `self` is used any more.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Drop for CurrentContext<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: room for the context that it gives back, the one that `current` pushed.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}

/// While this lives, this thread's calls do not end other threads' captures, nor are they refused for them.
pub(crate) struct RelaxedCapture(sys::CUstreamCaptureMode);

impl RelaxedCapture {
    pub fn new() -> Result<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a mode, which the driver swaps with this thread's own.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }
            .result()
            .map_err(refused("cuThreadExchangeStreamCaptureMode"))?;
        Ok(Self(mode))
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        // SAFETY: the mode that this thread had before.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}

/// A stream that somebody else owns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream(sys::CUstream);

impl Stream {
    /// # Safety
    /// `handle` is a stream of the device whose context is current when it is used, or 0.
    pub unsafe fn borrow(handle: usize) -> Self {
        Self(handle as sys::CUstream)
    }

    pub fn synchronize(self) -> Result<()> {
        // SAFETY: a stream by the promise of `borrow`, or one of `OwnStream`, which lives.
        unsafe { result::stream::synchronize(self.0) }.map_err(refused("cuStreamSynchronize"))
    }
}

/// A stream of one's own.
#[derive(Debug)]
pub(crate) struct OwnStream(pub Stream);

impl OwnStream {
    pub fn new() -> Result<Self> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Self(Stream(stream.map_err(refused("cuStreamCreate"))?)))
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and not used any more: whoever copied the inner stream had it for a call alone.
        let _ = unsafe { result::stream::destroy(self.0.0) };
    }
}

/// A kernel of a module. It stays loaded as long as the process lives: a graph that captured it may
/// be replayed after its runner is gone, and the driver would not say no.
#[derive(Debug)]
pub(crate) struct Kernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks of the grid.
    pub blocks: usize,
    /// Blocks of a cluster, of which `blocks` is a multiple; 1 for none.
    pub cluster: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of a block's dynamic shared memory.
    pub shared_bytes: usize,
}

impl Kernel {
    /// Load machine code of the current context's device, for its kernel of this name; blocks may take `shared_bytes`.
    pub fn load(code: &[u8], name: &CStr, shared_bytes: usize) -> Result<Self> {
        // SAFETY: an ELF, as NVRTC made it and the cache checked it, which tells its own size.
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) }
            .map_err(refused("cuModuleLoadData"))?;
        Self { module, function: function(module, name)? }.with_shared(shared_bytes)
    }

    /// Another kernel of its module, without dynamic shared memory.
    pub fn beside(&self, name: &CStr) -> Result<Self> {
        Ok(Self { module: self.module, function: function(self.module, name)? })
    }

    /// Another kernel of its module, whose blocks may take `shared_bytes`.
    pub fn beside_with(&self, name: &CStr, shared_bytes: usize) -> Result<Self> {
        self.beside(name)?.with_shared(shared_bytes)
    }

    fn with_shared(self, shared_bytes: usize) -> Result<Self> {
        use sys::CUfunction_attribute as A;
        self.set(A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes as i32)?;
        Ok(self)
    }

    /// Let clusters be of more than 8 blocks, which not every device can.
    pub fn allow_large_clusters(&self) -> Result<()> {
        let allowed =
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        self.set(allowed, 1)
    }

    fn set(&self, attribute: sys::CUfunction_attribute, value: i32) -> Result<()> {
        // SAFETY: a function of a module that stays loaded.
        unsafe { result::function::set_function_attribute(self.function, attribute, value) }
            .map_err(refused("cuFuncSetAttribute"))
    }

    /// How many clusters of this launch the device can run at once.
    pub fn clusters(&self, launch: Launch) -> Result<i32> {
        with_config(launch, Stream(std::ptr::null_mut()), |config| {
            let mut clusters = 0;
            // SAFETY: room for a number, a function of a module that stays loaded, and a launch that lives through the call.
            unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, self.function, config) }
                .result()
                .map_err(refused("cuOccupancyMaxActiveClusters"))?;
            Ok(clusters)
        })
    }

    /// # Safety
    /// The kernel's one parameter is a `T`, and every address in `argument` is what the kernel takes it for
    /// until the launch, and each replay of a graph that captured it, has run.
    pub unsafe fn launch<T>(&self, launch: Launch, stream: Stream, argument: &T) -> Result<()> {
        let mut parameters = [std::ptr::from_ref(argument).cast_mut().cast::<c_void>()];
        with_config(launch, stream, |config| {
            let (parameters, none) = (parameters.as_mut_ptr(), std::ptr::null_mut());
            // SAFETY: the one parameter is of the kernel's type, by the caller's promise, and the driver copies it before
            // it returns. What it points to is the caller's promise too. The module stays loaded.
            unsafe { sys::cuLaunchKernelEx(config, self.function, parameters, none) }
                .result()
                .map_err(refused("cuLaunchKernelEx"))
        })
    }
}

fn function(module: sys::CUmodule, name: &CStr) -> Result<sys::CUfunction> {
    // SAFETY: a module that was loaded, and stays so.
    unsafe { result::module::get_function(module, name.to_owned()) }
        .map_err(refused("cuModuleGetFunction"))
}

/// The driver's form of a launch.
fn with_config<T>(
    launch: Launch,
    stream: Stream,
    run: impl FnOnce(&sys::CUlaunchConfig) -> T,
) -> T {
    let cluster =
        sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster as u32, y: 1, z: 1 };
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: cluster },
    };
    run(&sys::CUlaunchConfig {
        gridDimX: launch.blocks as u32,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: launch.threads as u32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared_bytes as u32,
        hStream: stream.0,
        attrs: &mut attribute,
        // Devices without clusters know no such attribute.
        numAttrs: u32::from(launch.cluster > 1),
    })
}

/// One `T` on the device, zero at first. Never freed, for the reason that a [`Kernel`] is not unloaded.
#[derive(Debug)]
pub(crate) struct DeviceCell<T> {
    address: sys::CUdeviceptr,
    of: std::marker::PhantomData<T>,
}

impl<T: Copy + Default> DeviceCell<T> {
    pub fn new() -> Result<Self> {
        // SAFETY: what is allocated is set below, before anyone has its address.
        let address = unsafe { result::malloc_sync(size_of::<T>()) };
        let cell = Self {
            address: address.map_err(refused("cuMemAlloc_v2"))?,
            of: std::marker::PhantomData,
        };
        let stream = OwnStream::new()?;
        // SAFETY: so many bytes were allocated, and `stream` lives until they are set.
        unsafe { result::memset_d8_async(cell.address, 0, size_of::<T>(), stream.0.0) }
            .map_err(refused("cuMemsetD8Async"))?;
        stream.0.synchronize()?;
        Ok(cell)
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    /// What it holds once everything on `stream` so far has run; waits for that.
    pub fn read(&self, stream: Stream) -> Result<T> {
        let mut value = T::default();
        let to = std::slice::from_mut(&mut value);
        // SAFETY: a `T` is at the address, never freed, and whatever its bits are is one; `value` lives until the copy is made, below.
        unsafe { result::memcpy_dtoh_async(to, self.address, stream.0) }
            .map_err(refused("cuMemcpyDtoHAsync_v2"))?;
        stream.synchronize()?;
        Ok(value)
    }
}

/// Where the device sees host memory, by its address in this process: the driver refuses to register memory twice.
static REGISTERED: Mutex<BTreeMap<usize, sys::CUdeviceptr>> = Mutex::new(BTreeMap::new());

/// Host memory of this process's own that the device may read and write from now on, and where the device sees it. It
/// is never given up, for the reason that a [`Kernel`] is not unloaded; and whoever drops a runner, such as a garbage
/// collector, has no context to do it in, and may do it while a launch runs or another thread captures.
///
/// # Safety
/// `address` is that of `bytes` mapped bytes, which stay mapped as long as the process lives.
pub(crate) unsafe fn register(address: usize, bytes: usize) -> Result<sys::CUdeviceptr> {
    let mut all = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&device) = all.get(&address) {
        return Ok(device);
    }
    let host = address as *mut c_void;
    // Portable: for every context of this process; device map: at an address that kernels can use.
    let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
    // SAFETY: so many mapped bytes, by the caller's promise, of which none is registered yet.
    unsafe { sys::cuMemHostRegister_v2(host, bytes, flags) }
        .result()
        .map_err(refused("cuMemHostRegister_v2"))?;
    let mut device = 0;
    // SAFETY: room for an address, and memory that was just registered with a place on the device.
    if let Err(error) = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut device, host, 0) }.result()
    {
        // SAFETY: registered above, and nobody knows of it.
        let _ = unsafe { sys::cuMemHostUnregister(host) };
        return Err(refused("cuMemHostGetDevicePointer_v2")(error));
    }
    all.insert(address, device);
    Ok(device)
}
