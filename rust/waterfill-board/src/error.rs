//! What a board refuses, with the numbers and what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A refusal. Nothing was written to the board.
#[derive(Debug)]
pub enum Error {
    /// A shape or counts that the core refuses.
    Core(waterfill_core::Error),
    /// An array of another length.
    Length {
        /// Which array.
        name: &'static str,
        /// Its length.
        found: usize,
        /// The length it should have.
        expected: usize,
    },
    /// A rank outside the group.
    Rank {
        /// The rank.
        rank: usize,
        /// The group's size.
        ranks: usize,
    },
    /// A segment's header or file that does not fit.
    Foreign {
        /// Where the segment is.
        path: PathBuf,
        /// Which field.
        field: &'static str,
        /// What is there.
        found: u64,
        /// What should be there.
        expected: u64,
    },
    /// The system refused.
    System {
        /// Where the segment is.
        path: PathBuf,
        /// What was tried.
        call: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Core(error) => error.fmt(f),
            Self::Length { name, found, expected } => {
                write!(f, "{name} has length {found}: give {expected}")
            }
            Self::Rank { rank, ranks } => {
                write!(f, "rank {rank}: give a rank from 0 to {}", ranks - 1)
            }
            Self::Foreign { path, field, found, expected } => write!(
                f,
                "{}: {field} is {found:#x}, not {expected:#x}: not this server's board; \
                 remove it if no server runs",
                path.display()
            ),
            Self::System { path, call, source } => {
                write!(f, "{}: {call} failed: {source}", path.display())
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Core(error) => Some(error),
            Self::System { source, .. } => Some(source),
            _ => None,
        }
    }
}

pub(crate) fn check_length(name: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { name, found, expected }) }
}
