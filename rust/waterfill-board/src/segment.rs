//! A board in POSIX shared memory, for ranks that are processes of one host.
//!
//! One process creates it, the others attach, and then the name goes: whatever happens later, nothing is
//! left behind. A segment gets its name only when it is whole, and its creator holds a lock on it: the name
//! that a killed creator leaves is told by the free lock, and goes with the next board that this user creates.
//! A segment is refused by the first field that does not fit, before anything is written.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::{Error, Result, check_field, system};
use crate::header::{self, MAGIC};
use crate::layout::Shape;
use crate::presence::{self, End, Held, Presence};
use crate::region::Region;
use crate::sync::{AtomicU64, Ordering};

const OWNER_ONLY: Mode = Mode::RUSR.union(Mode::WUSR);

/// A mapped segment.
#[derive(Debug)]
pub struct Segment {
    map: MmapRaw,
    path: PathBuf,
    shape: Shape,
    /// Kept open for the creator's lock, and to ask for those of the ends.
    file: OwnedFd,
    /// Opened by name and kept, so that others find the board at this process once the name is gone: what
    /// `file` is called under `/proc` is no name where it was made without one.
    #[allow(dead_code)] // Held open, never used.
    named: Option<OwnedFd>,
}

impl Segment {
    /// Where Linux keeps POSIX shared memory.
    pub const FOLDER: &str = "/dev/shm";

    /// Create the segment `name`, for everybody who knows `run`, a number of this run alone. Names of
    /// boards whose creators were killed before they took them away are removed.
    ///
    /// # Errors
    /// There is one of that name already, or the memory is not to be had (all of it is reserved here,
    /// because a write to memory that is not there would kill the process later).
    pub fn create(name: &str, shape: Shape, run: u128) -> Result<Self> {
        let path = path_of(name)?;
        remove_left_behind();
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = rustix::fs::open(Self::FOLDER, flags, OWNER_ONLY)
            .map_err(|error| system(&path, "making the segment's file", error))?;
        Self::reserve(&file, shape)
            .map_err(|error| system(&path, "reserving the board's memory", error))?;
        let mut board = Self::map(file, shape, path)?;
        header::write(board.words(), shape, run);
        board.link().map_err(|error| system(&board.path, "creating the segment", error))?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Without it the board is as good, and found at the other ranks.
        board.named = rustix::fs::open(&board.path, flags, Mode::empty()).ok();
        Ok(board)
    }

    /// Lock the whole segment and give it its name.
    fn link(&self) -> std::result::Result<(), Errno> {
        rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive)?;
        let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(CWD, unnamed, CWD, &self.path, AtFlags::SYMLINK_FOLLOW)
    }

    fn reserve(file: &OwnedFd, shape: Shape) -> std::result::Result<(), Errno> {
        // The umask may have taken bits away at the creation.
        rustix::fs::fchmod(file, OWNER_ONLY)?;
        rustix::fs::fallocate(file, FallocateFlags::empty(), 0, shape.bytes() as u64)
    }

    /// Attach to the segment `name` that another process of this user created with the same shape and run.
    ///
    /// # Errors
    /// There is none (yet), or a field of the file or of its header does not fit: the error names it.
    pub fn attach(name: &str, shape: Shape, run: u128) -> Result<Self> {
        let path = path_of(name)?;
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|error| system(&path, "opening the segment", error))?;
        let stat = check_owner(&file, &path)?;
        check_field(&path, "size in bytes", stat.st_size as u64, shape.bytes() as u64)?;
        let board = Self::map(file, shape, path.clone())?;
        header::check(board.words(), shape, Some(run), &path)?;
        Ok(board)
    }

    fn map(file: OwnedFd, shape: Shape, path: PathBuf) -> Result<Self> {
        let map = MmapOptions::new().len(shape.bytes()).map_raw(&file).map_err(|source| {
            Error::System { path: path.clone(), call: "mapping the board", source }
        })?;
        Ok(Self { map, path, shape, file, named: None })
    }

    /// Where it is, or was before its name went.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Take the name away, once everybody is attached: the memory goes with the last of them.
    ///
    /// # Errors
    /// The system refuses; a name that is gone already is no error.
    pub fn unlink(&self) -> Result<()> {
        match rustix::fs::unlink(&self.path) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(system(&self.path, "removing its name", error)),
        }
    }
}

impl Region for Segment {
    fn words(&self) -> &[AtomicU64] {
        as_words(&self.map)
    }

    fn hold(&self, end: End) -> Result<Option<Held>> {
        let mark = self.shape.mark(end);
        let held = presence::hold(&self.file, mark * size_of::<AtomicU64>(), &self.path)?;
        // Release: who finds the mark finds the lock. Partner: the acquire in `presence_at`.
        self.words()[mark].store(1, Ordering::Release);
        Ok(Some(held))
    }

    fn presence(&self, end: End) -> Presence {
        presence_at(self.words(), &self.file, self.shape, end)
    }
}

/// What is known of the process at `end` of the board that `file` is.
pub(crate) fn presence_at(words: &[AtomicU64], file: &OwnedFd, shape: Shape, end: End) -> Presence {
    let mark = shape.mark(end);
    // Acquire: the lock was taken before the mark was made. Partner: the release in `hold`.
    if words[mark].load(Ordering::Acquire) == 0 {
        return Presence::Unwatched;
    }
    match presence::is_held(file, mark * size_of::<AtomicU64>()) {
        Some(true) => Presence::Here,
        Some(false) => Presence::Gone,
        None => Presence::Unwatched,
    }
}

/// Mapped bytes as words: the one place of this crate that is not safe code.
#[allow(unsafe_code)]
pub(crate) fn as_words(map: &MmapRaw) -> &[AtomicU64] {
    // SAFETY: the map is page-aligned, `len` bytes long, reserved when the segment was created, and lives as
    // long as the borrow. Its bytes are only ever accessed as atomics, here and in every process that passed
    // the checks of `attach` (only loaded where the map is read-only: `Observer` gives no words away);
    // another writer of the same user could store other values, which every reader checks, but no reference
    // other than to atomics exists.
    unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), map.len() / size_of::<AtomicU64>()) }
}

/// Remove the names of boards of this user that nobody holds a lock on. What cannot be removed stays.
fn remove_left_behind() {
    let Ok(entries) = std::fs::read_dir(Segment::FOLDER) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if let Some(_locked) = left_behind(&path) {
            let _ = rustix::fs::unlink(&path);
        }
    }
}

/// The board at `path`, locked, if it is one of this user's whose creator is dead. The lock that tells is kept until after
/// the name is gone: of two who look, one removes, and the other finds a file without a name.
fn left_behind(path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    check_owner(&file, path).ok()?;
    let mut magic = [0; size_of::<u64>()];
    rustix::io::pread(&file, &mut magic, 0).ok()?;
    if u64::from_ne_bytes(magic) != MAGIC {
        return None;
    }
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    (rustix::fs::fstat(&file).ok()?.st_nlink == 1).then_some(file)
}

/// A file of this user's alone; gives its state.
pub(crate) fn check_owner(file: &OwnedFd, path: &Path) -> Result<Stat> {
    let stat = rustix::fs::fstat(file).map_err(|error| system(path, "reading its state", error))?;
    let kind = FileType::from_raw_mode(stat.st_mode).as_raw_mode();
    check_field(path, "file type", kind.into(), FileType::RegularFile.as_raw_mode().into())?;
    check_field(path, "owner", stat.st_uid.into(), rustix::process::geteuid().as_raw().into())?;
    let mode = Mode::from_raw_mode(stat.st_mode).as_raw_mode();
    check_field(path, "mode", mode.into(), OWNER_ONLY.as_raw_mode().into())?;
    Ok(stat)
}

fn path_of(name: &str) -> Result<PathBuf> {
    let path = Path::new(Segment::FOLDER).join(name);
    if name.is_empty() || path.file_name() != Some(OsStr::new(name)) {
        return Err(system(&path, "naming the segment (give a name without '/')", Errno::INVAL));
    }
    Ok(path)
}
