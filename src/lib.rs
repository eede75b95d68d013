//! Attention on any GPU.
#![warn(missing_docs)]
pub mod attention;
pub mod error;
pub mod gpu;
pub mod ops;
pub mod reference;

pub use error::{Error, Result};
pub use wgpu;
