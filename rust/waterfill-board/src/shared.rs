//! A board in POSIX shared memory, for ranks that are processes of one host.
//!
//! One process creates it, the others attach, and then the name goes: whatever happens later, nothing is
//! left behind. A segment is refused by the first field that does not fit, before anything is written.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::layout::{HEADER, Shape};
use crate::region::Region;
use crate::sync::{AtomicU64, Ordering};

/// Where Linux keeps POSIX shared memory.
const FOLDER: &str = "/dev/shm";
/// "wfboard" and the layout's version: raised whenever a word means something else.
const MAGIC: u64 = u64::from_be_bytes(*b"wfboard\x01");
/// The header's words, in order.
const FIELDS: [&str; 5] = ["ranks", "experts", "words", "run token, low", "run token, high"];
const OWNER_ONLY: Mode = Mode::RUSR.union(Mode::WUSR);

/// A mapped segment.
#[derive(Debug)]
pub struct Shared {
    map: MmapRaw,
    words: usize,
    path: PathBuf,
}

impl Shared {
    /// Create the segment `name`, for everybody who knows `run`, a number of this run alone.
    ///
    /// # Errors
    /// There is one of that name already, or the memory is not to be had (all of it is reserved here,
    /// because a write to memory that is not there would kill the process later).
    pub fn create(name: &str, shape: Shape, run: u128) -> Result<Self> {
        let path = path_of(name)?;
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, OWNER_ONLY)
            .map_err(|error| system(&path, "creating the segment", error))?;
        let made = Self::reserve(&file, shape)
            .map_err(|error| system(&path, "reserving the board's memory", error))
            .and_then(|()| Self::map(&file, shape, path.clone()));
        let board = match made {
            Ok(board) => board,
            Err(error) => {
                // The error at hand says more than a failure to clean up would.
                let _ = rustix::fs::unlink(&path);
                return Err(error);
            }
        };
        let words = board.words();
        for (word, value) in words[1..].iter().zip(fields(shape, run)) {
            // Relaxed: published by the magic below.
            word.store(value, Ordering::Relaxed);
        }
        // Release: who finds the magic finds the fields. Partner: the acquire in `attach`.
        words[0].store(MAGIC, Ordering::Release);
        Ok(board)
    }

    fn reserve(file: &OwnedFd, shape: Shape) -> std::result::Result<(), Errno> {
        // The umask may have taken bits away at the creation.
        rustix::fs::fchmod(file, OWNER_ONLY)?;
        rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes(shape) as u64)
    }

    /// Attach to the segment `name` that another process of this user created with the same shape and run.
    ///
    /// # Errors
    /// There is none, or a field of the file or of its header does not fit: the error names it. A
    /// segment whose creator is not done yet has no magic: try again.
    pub fn attach(name: &str, shape: Shape, run: u128) -> Result<Self> {
        let path = path_of(name)?;
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|error| system(&path, "opening the segment", error))?;
        let stat =
            rustix::fs::fstat(&file).map_err(|error| system(&path, "reading its state", error))?;
        let check = |field, found: u64, expected: u64| {
            if found == expected {
                return Ok(());
            }
            Err(Error::Foreign { path: path.clone(), field, found, expected })
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        check("file type", kind.as_raw_mode().into(), FileType::RegularFile.as_raw_mode().into())?;
        check("owner", stat.st_uid.into(), rustix::process::geteuid().as_raw().into())?;
        let mode = Mode::from_raw_mode(stat.st_mode);
        check("mode", mode.as_raw_mode().into(), OWNER_ONLY.as_raw_mode().into())?;
        check("size in bytes", stat.st_size as u64, bytes(shape) as u64)?;
        let board = Self::map(&file, shape, path.clone())?;
        let words = board.words();
        // Acquire: the fields were written before it. Partner: the release in `create`.
        check("magic and version", words[0].load(Ordering::Acquire), MAGIC)?;
        for ((field, word), value) in FIELDS.into_iter().zip(&words[1..]).zip(fields(shape, run)) {
            // Relaxed: ordered by the acquire above.
            check(field, word.load(Ordering::Relaxed), value)?;
        }
        Ok(board)
    }

    fn map(file: &OwnedFd, shape: Shape, path: PathBuf) -> Result<Self> {
        let map = MmapOptions::new().len(bytes(shape)).map_raw(file).map_err(|source| {
            Error::System { path: path.clone(), call: "mapping the board", source }
        })?;
        Ok(Self { map, words: shape.words(), path })
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

#[allow(unsafe_code)] // The one place: mapped bytes as atomics.
impl Region for Shared {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the map is page-aligned, `words * 8` bytes long, reserved when it was created, and
        // lives as long as `self`. Its bytes are only ever accessed as atomics, here and in every process
        // that passed the checks of `attach`; another writer of the same user could store other values,
        // which every reader checks, but no reference other than to atomics exists.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.words) }
    }
}

fn fields(shape: Shape, run: u128) -> [u64; FIELDS.len()] {
    const { assert!(FIELDS.len() < HEADER) };
    [shape.ranks as u64, shape.experts as u64, shape.words() as u64, run as u64, (run >> 64) as u64]
}

fn bytes(shape: Shape) -> usize {
    shape.words() * size_of::<AtomicU64>()
}

fn path_of(name: &str) -> Result<PathBuf> {
    let path = Path::new(FOLDER).join(name);
    if name.is_empty() || path.file_name() != Some(OsStr::new(name)) {
        return Err(system(&path, "naming the segment (give a name without '/')", Errno::INVAL));
    }
    Ok(path)
}

fn system(path: &Path, call: &'static str, error: Errno) -> Error {
    Error::System { path: path.to_path_buf(), call, source: error.into() }
}
