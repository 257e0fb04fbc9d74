//! The few driver calls that are needed, as results. Every raw call of this crate but the compiler's is here.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use crate::error::{Error, Result};
use crate::library::open_driver;

fn check(call: &'static str, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(Error::Driver { call, name: format!("{result:?}"), code: result as u32 })
}

/// Call a function of the driver that writes one value.
macro_rules! ask {
    ($function:ident, $($argument:expr),*) => {{
        let mut value = MaybeUninit::uninit();
        // SAFETY: the driver is there (`Device::new` asked), the first argument is room for its result, and
        // the others are values of this crate's own.
        let result = unsafe { sys::$function(value.as_mut_ptr(), $($argument),*) };
        // SAFETY: the driver wrote it, if it succeeded.
        check(stringify!($function), result).map(|()| unsafe { value.assume_init() })
    }};
}

/// Call a function of the driver.
macro_rules! call {
    ($function:ident, $($argument:expr),*) => {
        // SAFETY: the driver is there (`Device::new` asked); the caller says why the arguments are good.
        check(stringify!($function), unsafe { sys::$function($($argument),*) })
    };
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
        open_driver()?;
        call!(cuInit, 0)?;
        let device = ask!(cuDeviceGet, ordinal as i32)?;
        let context = ask!(cuDevicePrimaryCtxRetain, device)?;
        Ok(Self { device, context })
    }

    pub fn current(&self) -> Result<CurrentContext<'_>> {
        // Nearly always it is torch's, and the same.
        let pushed = ask!(cuCtxGetCurrent,)? != self.context;
        if pushed {
            call!(cuCtxPushCurrent_v2, self.context)?;
        }
        Ok(CurrentContext { pushed, of: std::marker::PhantomData })
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<usize> {
        Ok(ask!(cuDeviceGetAttribute, attribute, self.device)?.max(0) as usize)
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
        let _ = call!(cuDevicePrimaryCtxRelease_v2, self.device);
    }
}

impl Drop for CurrentContext<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let _ = ask!(cuCtxPopCurrent_v2,);
        }
    }
}

/// While this lives, this thread's calls do not end other threads' captures, nor are they refused for them.
pub(crate) struct RelaxedCapture(sys::CUstreamCaptureMode);

impl RelaxedCapture {
    pub fn new() -> Result<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // The driver swaps the thread's mode with this one.
        call!(cuThreadExchangeStreamCaptureMode, &mut mode)?;
        Ok(Self(mode))
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        let _ = call!(cuThreadExchangeStreamCaptureMode, &mut self.0);
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
        call!(cuStreamSynchronize, self.0)
    }
}

/// A stream of one's own.
#[derive(Debug)]
pub(crate) struct OwnStream(pub Stream);

impl OwnStream {
    pub fn new() -> Result<Self> {
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        Ok(Self(Stream(ask!(cuStreamCreate, flags)?)))
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        let _ = call!(cuStreamDestroy_v2, self.0.0);
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
        // An image of an ELF tells its own size.
        let module = ask!(cuModuleLoadData, code.as_ptr().cast())?;
        let kernel = Self { module, function: ask!(cuModuleGetFunction, module, name.as_ptr())? };
        use sys::CUfunction_attribute as A;
        let most = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        call!(cuFuncSetAttribute, kernel.function, most, shared_bytes as i32)?;
        Ok(kernel)
    }

    /// Another kernel of its module, without dynamic shared memory.
    pub fn beside(&self, name: &CStr) -> Result<Self> {
        let module = self.module;
        Ok(Self { module, function: ask!(cuModuleGetFunction, module, name.as_ptr())? })
    }

    /// Let clusters be of more than 8 blocks, which not every device can.
    pub fn allow_large_clusters(&self) -> Result<()> {
        let allowed =
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        call!(cuFuncSetAttribute, self.function, allowed, 1)
    }

    /// How many clusters of this launch the device can run at once.
    pub fn clusters(&self, launch: Launch) -> Result<i32> {
        with_config(launch, Stream(std::ptr::null_mut()), |config| {
            ask!(cuOccupancyMaxActiveClusters, self.function, config)
        })
    }

    /// # Safety
    /// The kernel's one parameter is a `T`, and every address in `argument` is what the kernel takes it for
    /// until the launch, and each replay of a graph that captured it, has run.
    pub unsafe fn launch<T>(&self, launch: Launch, stream: Stream, argument: &T) -> Result<()> {
        let mut parameters = [std::ptr::from_ref(argument).cast_mut().cast::<c_void>()];
        with_config(launch, stream, |config| {
            // The driver copies the parameter before it returns.
            call!(
                cuLaunchKernelEx,
                config,
                self.function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut()
            )
        })
    }
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
        let cell =
            Self { address: ask!(cuMemAlloc_v2, size_of::<T>())?, of: std::marker::PhantomData };
        let stream = OwnStream::new()?;
        call!(cuMemsetD8Async, cell.address, 0, size_of::<T>(), stream.0.0)?;
        stream.0.synchronize()?;
        Ok(cell)
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    /// What it holds once everything on `stream` so far has run; waits for that.
    pub fn read(&self, stream: Stream) -> Result<T> {
        let mut value = T::default();
        let to = std::ptr::from_mut(&mut value).cast();
        call!(cuMemcpyDtoHAsync_v2, to, self.address, size_of::<T>(), stream.0)?;
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
    call!(cuMemHostRegister_v2, host, bytes, flags)?;
    let device = ask!(cuMemHostGetDevicePointer_v2, host, 0).inspect_err(|_| {
        let _ = call!(cuMemHostUnregister, host);
    })?;
    all.insert(address, device);
    Ok(device)
}
