//! A board as it looks from outside: read only, by somebody who knows nothing but where it is.

use std::os::fd::OwnedFd;
use std::path::Path;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{Mode, OFlags};
use waterfill_core::check_length;

use crate::error::{Error, Result, system};
use crate::header;
use crate::layout::Shape;
use crate::presence::{End, Presence};
use crate::region::Region;
use crate::segment::{as_words, check_owner, presence_at};
use crate::sync::AtomicU64;
use crate::tally::{Published, Tally};

/// What a snapshot's fields mean; raised whenever one changes.
pub const SNAPSHOT_VERSION: u32 = 3;

/// What ranks and planner counted until now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The group's shape.
    pub shape: Shape,
    /// `[R]` how each rank's calls ended.
    pub ranks: Vec<Tally>,
    /// What the planner made.
    pub planner: Published,
    /// `[R]` what is known of each rank's process.
    pub presence: Vec<Presence>,
    /// What is known of the planner's.
    pub planner_presence: Presence,
}

impl Snapshot {
    /// Of a board that is at hand, of this shape.
    ///
    /// # Errors
    /// A region of another size than the shape's.
    pub fn of(region: &impl Region, shape: Shape) -> Result<Self> {
        check_length("region", region.words().len(), shape.words())?;
        Ok(Self::read(region.words(), shape, |end| region.presence(end)))
    }

    fn read(words: &[AtomicU64], shape: Shape, presence: impl Fn(End) -> Presence) -> Self {
        let ranks = 0..shape.ranks;
        Self {
            shape,
            ranks: ranks.clone().map(|rank| Tally::read(words, shape, rank)).collect(),
            planner: Published::read(words, shape),
            presence: ranks.map(|rank| presence(End::Rank(rank))).collect(),
            planner_presence: presence(End::Planner),
        }
    }
}

/// A segment, mapped to be read.
#[derive(Debug)]
pub struct Observer {
    map: MmapRaw,
    /// To ask for the locks of the ends.
    file: OwnedFd,
    shape: Shape,
}

impl Observer {
    /// Attach to the segment at `path`, whatever its shape and run: a name in `/dev/shm`, or, once that is
    /// gone, a descriptor of a process that has it open (`/proc/PID/fd/N`).
    ///
    /// # Errors
    /// It is not to be had, not this user's, or not a board of this version: the error names the field.
    pub fn attach(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| system(path, "opening the segment", error))?;
        let stat = check_owner(&file, path)?;
        let bytes = stat.st_size as usize;
        let map = MmapOptions::new().len(bytes).map_raw_read_only(&file).map_err(|source| {
            Error::System { path: path.into(), call: "mapping the board", source }
        })?;
        let shape = header::shape_of(as_words(&map), path)?;
        Ok(Self { map, file, shape })
    }

    /// What stands there now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let words = as_words(&self.map);
        Snapshot::read(words, self.shape, |end| presence_at(words, &self.file, self.shape, end))
    }
}
