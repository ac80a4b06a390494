//! NCCL's functions, loaded at run time: thin, one method a call. The header is the nccl.h of 2.28; newer ones of the same major
//! version take what is used of it here as it is.
//!
//! cudarc binds the same functions, but does not know `libnccl.so.2`, the only name that packages have, and panics where it
//! is absent; its communicator aborts in its destructor and panics if that fails; and results come as an enum, in which
//! a code of another version would be undefined.
//!
//! It needs `unsafe` because these are C functions behind pointers.
#![allow(unsafe_code)]

use crate::{collective::ReduceOp, device::streams::RawStream, nvrtc::loader_says};
use std::{
    ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void},
    mem::ManuallyDrop,
    path::Path,
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tch::{Kind, Tensor};

/// The library, as packages and libtorch name it.
const NAME: &str = "libnccl.so.2";
/// What libtorch comes with. Newer ones of the same major version take its place.
const NEEDED: (i32, i32) = (2, 28);
/// How long an abort waits for a call that another thread is in; calls of a communicator that does not block return at once.
const POLITE: Duration = Duration::from_secs(1);
/// Between two looks at a communicator that is being closed.
const LOOK: Duration = Duration::from_millis(1);

/// ncclResult_t.
type Status = c_int;
const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;
/// ncclComm_t.
type Handle = *mut c_void;
/// cudaStream_t.
type Stream = *mut c_void;

/// What names a world to NCCL: rank 0 makes it, all begin with it.
pub const ID_BYTES: usize = 128;

/// ncclUniqueId, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; ID_BYTES]);

/// ncclConfig_t of 2.28.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

impl Config {
    /// What `NCCL_CONFIG_INITIALIZER` has, but that no call waits: initialisation and operations can be watched and aborted.
    fn that_does_not_block() -> Self {
        const UNSET: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: (NEEDED.0 * 10_000 + NEEDED.1 * 100).cast_unsigned(),
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: ptr::null(),
            split_share: UNSET,
            traffic_class: UNSET,
            comm_name: ptr::null(),
            collnet_enable: UNSET,
            cta_policy: UNSET,
            shrink_share: UNSET,
            nvls_ctas: UNSET,
            channels_per_net_peer: UNSET,
            nvlink_centric_sched: UNSET,
        }
    }
}

/// Why NCCL does not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// No library, or one that lacks a function.
    #[error("NCCL cannot be loaded: {reason}")]
    Missing {
        /// What the loader says.
        reason: String,
    },
    /// Too old, or of a later generation.
    #[error("NCCL is {major}.{minor}, and {}.{} or a newer {} is needed", NEEDED.0, NEEDED.1, NEEDED.0)]
    Version {
        /// Major.
        major: i32,
        /// Minor.
        minor: i32,
    },
    /// A call failed.
    #[error("{call}: {reason}")]
    Call {
        /// The function.
        call: &'static str,
        /// NCCL's word for the code, and its last error.
        reason: String,
    },
}

type ToAll = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;

/// The library and its functions.
pub struct Library {
    version: (i32, i32),
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    init: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Status,
    async_error: unsafe extern "C" fn(Handle, *mut Status) -> Status,
    finalize: unsafe extern "C" fn(Handle) -> Status,
    destroy: unsafe extern "C" fn(Handle) -> Status,
    abort: unsafe extern "C" fn(Handle) -> Status,
    all_reduce: ToAll,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> Status,
    reduce_scatter: ToAll,
    broadcast: ToAll,
    /// Stays loaded: NCCL has threads of its own.
    _library: ManuallyDrop<libloading::Library>,
}

impl Library {
    /// Loads NCCL: the library at `path`, or the one that the system's loader finds. Needs neither a driver nor a GPU.
    ///
    /// # Errors
    /// If there is none, if it is too old or of another generation, or if it lacks a function.
    pub fn open(path: Option<&Path>) -> Result<Self, NcclError> {
        let name = path.map_or(OsStr::new(NAME), Path::as_os_str);
        // SAFETY: NCCL's initialisers do nothing that concerns us.
        let library = unsafe { libloading::Library::new(name) };
        let library = ManuallyDrop::new(library.map_err(missing)?);
        let version = version(&library)?;
        if version.0 != NEEDED.0 || version < NEEDED {
            let (major, minor) = version;
            return Err(NcclError::Version { major, minor });
        }
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field that takes the pointer has the type of the function of this name in nccl.h.
                unsafe { library.get($name) }
                    .map(|symbol| *symbol)
                    .map_err(missing)?
            };
        }
        Ok(Self {
            version,
            error_string: function!("ncclGetErrorString"),
            last_error: function!("ncclGetLastError"),
            unique_id: function!("ncclGetUniqueId"),
            init: function!("ncclCommInitRankConfig"),
            async_error: function!("ncclCommGetAsyncError"),
            finalize: function!("ncclCommFinalize"),
            destroy: function!("ncclCommDestroy"),
            abort: function!("ncclCommAbort"),
            all_reduce: function!("ncclAllReduce"),
            all_gather: function!("ncclAllGather"),
            reduce_scatter: function!("ncclReduceScatter"),
            broadcast: function!("ncclBroadcast"),
            _library: library,
        })
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// A new world's name. The process that makes it listens for the others' first word until all have come.
    ///
    /// # Errors
    /// What NCCL says: there is no network interface that it may use.
    pub fn unique_id(&self) -> Result<[u8; ID_BYTES], NcclError> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: writes an id.
        let status = unsafe { (self.unique_id)(&mut id) };
        self.check("ncclGetUniqueId", status, ptr::null_mut())?;
        Ok(id.0.map(c_char::cast_unsigned))
    }

    /// A call of a communicator that does not block has succeeded, or is on its way.
    fn check(&self, call: &'static str, status: Status, comm: Handle) -> Result<(), NcclError> {
        if matches!(status, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: both live as long as the library and end in a zero, for any code; the second is a buffer that NCCL writes at
        // its next error, so that it may be the text of another one.
        let (code, last) = unsafe { ((self.error_string)(status), (self.last_error)(comm)) };
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: as above.
            false => unsafe { CStr::from_ptr(text) }
                .to_string_lossy()
                .trim()
                .replace('\n', " "),
        };
        let reason = match text(last) {
            last if last.is_empty() => text(code),
            last => format!("{} ({last})", text(code)),
        };
        Err(NcclError::Call { call, reason })
    }
}

fn missing(error: libloading::Error) -> NcclError {
    NcclError::Missing {
        reason: loader_says(&error),
    }
}

fn version(library: &libloading::Library) -> Result<(i32, i32), NcclError> {
    type GetVersion = unsafe extern "C" fn(*mut c_int) -> Status;
    let mut number: c_int = 0;
    // SAFETY: the type is that of nccl.h.
    let get = unsafe { library.get::<GetVersion>("ncclGetVersion") }.map_err(missing)?;
    // SAFETY: writes a number.
    match unsafe { get(&mut number) } {
        // From 2.9 on: 10000 * major + 100 * minor + patch.
        SUCCESS => Ok((number / 10_000, number % 10_000 / 100)),
        status => Err(NcclError::Call {
            call: "ncclGetVersion",
            reason: format!("status {status}"),
        }),
    }
}

/// An operation with its tensors: contiguous, in the memory of the communicator's GPU, of a kind that `data_type` knows, and
/// not empty.
pub enum Work<'a> {
    /// Reduces in place.
    AllReduce {
        /// Values.
        tensor: &'a Tensor,
        /// How.
        op: ReduceOp,
    },
    /// `all` has as many times `local` as there are ranks.
    AllGather {
        /// From here.
        local: &'a Tensor,
        /// To here.
        all: &'a Tensor,
    },
    /// `full` has as many times `own` as there are ranks.
    ReduceScatter {
        /// From here.
        full: &'a Tensor,
        /// To here.
        own: &'a Tensor,
    },
    /// Copies in place.
    Broadcast {
        /// Values.
        tensor: &'a Tensor,
        /// From whom.
        root: u32,
    },
}

impl Work<'_> {
    /// NCCL's function, and the tensor whose elements it counts.
    fn parts(&self) -> (&'static str, &Tensor) {
        match self {
            Self::AllReduce { tensor, .. } => ("ncclAllReduce", tensor),
            Self::AllGather { local, .. } => ("ncclAllGather", local),
            Self::ReduceScatter { own, .. } => ("ncclReduceScatter", own),
            Self::Broadcast { tensor, .. } => ("ncclBroadcast", tensor),
        }
    }

    /// True if there is nothing to move.
    pub fn is_empty(&self) -> bool {
        self.parts().1.numel() == 0
    }
}

/// One rank's end of a world. Its calls do not wait: what was started is asked for with [`Comm::state`].
pub struct Comm {
    library: Arc<Library>,
    handle: Handle,
    /// Held during calls.
    calls: Mutex<()>,
    ended: AtomicBool,
}

// SAFETY: NCCL's communicators may be used from any thread, by one at a time, which `calls` sees to; an abort may come from
// another thread while a call is on its way.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

/// How far a communicator is with what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is still busy with the last call.
    Busy,
    /// It takes the next call; what it was given is on its stream.
    Ready,
}

impl Comm {
    /// Begins to connect `ranks` ranks, this one on the current context's GPU.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn begin(
        library: Arc<Library>,
        id: &[u8; ID_BYTES],
        rank: u32,
        ranks: u32,
    ) -> Result<Self, NcclError> {
        let id = UniqueId(id.map(u8::cast_signed));
        let mut config = Config::that_does_not_block();
        let mut handle = ptr::null_mut();
        let number = |value: u32| c_int::try_from(value).unwrap_or(c_int::MAX);
        // SAFETY: writes a handle; the configuration is that of the version it names, and is read during the call.
        let status = unsafe { (library.init)(&mut handle, number(ranks), id, number(rank), &mut config) };
        library.check("ncclCommInitRankConfig", status, ptr::null_mut())?;
        if handle.is_null() {
            return Err(NcclError::Call {
                call: "ncclCommInitRankConfig",
                reason: "it makes no communicator".to_owned(),
            });
        }
        Ok(Self {
            library,
            handle,
            calls: Mutex::new(()),
            ended: AtomicBool::new(false),
        })
    }

    /// How far it is; busy while another thread is in a call.
    ///
    /// # Errors
    /// What has happened since to it or to a peer, asynchronously.
    pub fn state(&self) -> Result<State, NcclError> {
        let calls = match self.calls.try_lock() {
            Ok(calls) => calls,
            Err(TryLockError::Poisoned(calls)) => calls.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(State::Busy),
        };
        let status = self.call(&calls, "ncclCommGetAsyncError", |library, handle| {
            let mut state = SUCCESS;
            // SAFETY: the communicator lives; writes a number.
            let status = unsafe { (library.async_error)(handle, &mut state) };
            match status {
                SUCCESS => state,
                status => status,
            }
        })?;
        Ok(match status {
            IN_PROGRESS => State::Busy,
            _ => State::Ready,
        })
    }

    /// Gives it an operation for `stream`. The tensors have to live until the operation is done or the communicator has ended:
    /// what NCCL writes is memory of a GPU, so one that went before would cost wrong numbers there, not this process's memory.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn enqueue(&self, work: &Work<'_>, RawStream(stream): RawStream) -> Result<(), NcclError> {
        let (call, tensor) = work.parts();
        let count = tensor.numel();
        let Some(kind) = data_type(tensor.kind()) else {
            let reason = format!("NCCL has no {:?}", tensor.kind());
            return Err(NcclError::Call { call, reason });
        };
        let at = |tensor: &Tensor| tensor.data_ptr();
        self.call(&self.take(), call, |library, comm| {
            // SAFETY: the communicator and the stream live. The pointers are those of contiguous tensors of `count` elements
            // of that kind (`all` and `full` of so many for each rank), in memory that the communicator's GPU may use.
            unsafe {
                match *work {
                    Work::AllReduce { tensor, op } => {
                        (library.all_reduce)(at(tensor), at(tensor), count, kind, reduction(op), comm, stream)
                    }
                    Work::AllGather { local, all } => {
                        (library.all_gather)(at(local), at(all), count, kind, comm, stream)
                    }
                    Work::ReduceScatter { full, own } => {
                        let sum = reduction(ReduceOp::Sum);
                        (library.reduce_scatter)(at(full), at(own), count, kind, sum, comm, stream)
                    }
                    Work::Broadcast { tensor, root } => {
                        let root = c_int::try_from(root).unwrap_or(c_int::MAX);
                        (library.broadcast)(at(tensor), at(tensor), count, kind, root, comm, stream)
                    }
                }
            }
        })
        .map(drop)
    }

    /// Ends it in good order, after what it still has to send is sent; by force if that takes longer than `limit`.
    pub fn close(&self, limit: Duration) {
        let begun = self.call(&self.take(), "ncclCommFinalize", |library, comm| {
            // SAFETY: the communicator lives.
            unsafe { (library.finalize)(comm) }
        });
        let since = Instant::now();
        let mut state = begun.and_then(|_| self.state());
        while state == Ok(State::Busy) && since.elapsed() < limit {
            thread::sleep(LOOK);
            state = self.state();
        }
        match state {
            Ok(State::Ready) => self.end(|library, comm| {
                // SAFETY: the communicator lives, and nobody uses it after this.
                unsafe { (library.destroy)(comm) }
            }),
            _ => self.abort(),
        }
    }

    /// Ends it by force, whatever it is busy with; calls that wait in it return. May come from another thread than the rest.
    pub fn abort(&self) {
        self.end(|library, comm| {
            // SAFETY: the communicator lives, and nobody uses it after this.
            unsafe { (library.abort)(comm) }
        });
    }

    fn take(&self) -> MutexGuard<'_, ()> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(
        &self,
        _calls: &MutexGuard<'_, ()>,
        call: &'static str,
        ask: impl FnOnce(&Library, Handle) -> Status,
    ) -> Result<Status, NcclError> {
        if self.ended.load(Ordering::SeqCst) {
            let reason = "the communicator has ended".to_owned();
            return Err(NcclError::Call { call, reason });
        }
        let status = ask(&self.library, self.handle);
        self.library.check(call, status, self.handle).map(|()| status)
    }

    fn end(&self, ask: impl FnOnce(&Library, Handle) -> Status) {
        // A call that does not come back is in the way of nothing: NCCL lets another thread abort it then, and no later call
        // begins.
        let _calls = self.hold();
        if !self.ended.swap(true, Ordering::SeqCst) {
            // Whatever it says, there is nothing left to do.
            ask(&self.library, self.handle);
        }
    }

    /// `None` if another thread does not come out of its call.
    fn hold(&self) -> Option<MutexGuard<'_, ()>> {
        let since = Instant::now();
        loop {
            match self.calls.try_lock() {
                Ok(calls) => return Some(calls),
                Err(TryLockError::Poisoned(calls)) => return Some(calls.into_inner()),
                Err(TryLockError::WouldBlock) if since.elapsed() < POLITE => thread::sleep(LOOK),
                Err(TryLockError::WouldBlock) => return None,
            }
        }
    }
}

/// ncclDataType_t of a kind.
fn data_type(kind: Kind) -> Option<c_int> {
    match kind {
        Kind::Uint8 => Some(1),
        Kind::Int64 => Some(4),
        Kind::Half => Some(6),
        Kind::Float => Some(7),
        Kind::Double => Some(8),
        Kind::BFloat16 => Some(9),
        _ => None,
    }
}

/// ncclRedOp_t.
fn reduction(op: ReduceOp) -> c_int {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 2,
    }
}
