//! What a board refuses, with the numbers and what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A refusal. Nothing was written to the board.
#[derive(Debug)]
pub enum Error {
    /// A shape, counts or lengths that the core refuses, in its words.
    Core(waterfill_core::Error),
    /// More redundant experts than there can be.
    Redundant {
        /// The number given.
        redundant: usize,
        /// Number of physical experts.
        experts: usize,
    },
    /// Another cost model than rows where plans choose among replicas.
    CostWithReplicas {
        /// Number of redundant experts.
        redundant: usize,
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
            Self::Redundant { redundant, experts } => write!(
                f,
                "{redundant} redundant of {experts} physical experts: give fewer, as each logical expert has one \
                 that is not redundant"
            ),
            Self::CostWithReplicas { redundant } => write!(
                f,
                "a cost model other than rows, with {redundant} redundant experts: give that of rows, because ranks do \
                 not post the rows of each expert then"
            ),
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

impl From<waterfill_core::Error> for Error {
    fn from(error: waterfill_core::Error) -> Self {
        Self::Core(error)
    }
}

pub(crate) fn system(path: &Path, call: &'static str, error: Errno) -> Error {
    Error::System { path: path.to_path_buf(), call, source: error.into() }
}

/// A field of a segment's file or header is what it should be.
pub(crate) fn check_field(
    path: &Path,
    field: &'static str,
    found: u64,
    expected: u64,
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Foreign { path: path.to_path_buf(), field, found, expected })
}
