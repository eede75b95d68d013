//! One error type. A refusal names the argument, its value and the bound it breaks.

use std::path::{Path, PathBuf};

/// What this crate answers when it cannot do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument that cannot be honoured: its name, its value, and what would be accepted.
    #[error("{argument} is {value}: {bound}")]
    Refused {
        /// The argument, tensor or option, by the name the caller knows it by.
        argument: String,
        /// The value that was given.
        value: String,
        /// What would be accepted.
        bound: String,
    },
    /// A file that is missing, malformed, contradicts another one, or cannot be written.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        what: String,
    },
    /// There is no adapter, or the one asked for is not there.
    #[error("{0}")]
    NoAdapter(String),
    /// The device or its driver ran out of memory.
    #[error("out of device memory: {0}")]
    OutOfMemory(String),
    /// The device was lost: a driver reset, an unplugged adapter, a watchdog.
    #[error("the device was lost: {0}")]
    DeviceLost(String),
    /// The device or the driver refused something this crate should not have asked for.
    #[error("the device refused a command: {0}")]
    Device(String),
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A refusal of `argument`, which is `value`, because of `bound`.
    pub fn refused(
        argument: impl Into<String>,
        value: impl std::fmt::Display,
        bound: impl Into<String>,
    ) -> Self {
        Error::Refused {
            argument: argument.into(),
            value: value.to_string(),
            bound: bound.into(),
        }
    }

    /// Something wrong with the file at `path`.
    pub fn file(path: impl AsRef<Path>, what: impl std::fmt::Display) -> Self {
        Error::File {
            path: path.as_ref().to_owned(),
            what: what.to_string(),
        }
    }
}
