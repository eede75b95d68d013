//! Attention on any GPU.
#![warn(missing_docs)]
pub mod attention;
#[cfg(feature = "models")]
pub mod cache;
pub mod error;
#[cfg(feature = "models")]
pub mod generate;
pub mod gpu;
#[cfg(feature = "models")]
pub mod layers;
#[cfg(feature = "models")]
pub mod model;
pub mod ops;
pub mod reference;
#[cfg(feature = "models")]
pub mod text;
#[cfg(feature = "models")]
pub mod translate;

pub use error::{Error, Result};
pub use wgpu;
