//! Attention on any GPU: WGSL compute shaders for QK<sup>T</sup>, softmax and the weighted sum of V, on
//! wgpu, and the encoder-decoder stacks that are built of them.
//!
//! # Two roads through the crate
//!
//! **Attention itself** is four nouns and four steps. A [`attention::Problem`] is checked, a
//! [`attention::Plan`] is chosen from it and the device's [`gpu::Caps`], its kernels are looked up or
//! compiled, and they are dispatched into a [`gpu::Recorder`]. The finished [`gpu::Recording`] can be
//! encoded into anybody's command encoder, any number of times; nothing is submitted or allocated then.
//!
//! ```no_run
//! use qkv::attention::{self, Options, Tensors, View};
//! use qkv::gpu::{DType, Gpu, Recorder};
//!
//! # fn main() -> qkv::Result<()> {
//! let gpu = Gpu::new()?; // or Gpu::from_wgpu(&device, &queue)
//! let shape = [1, 8, 128, 64]; // batch, heads, length, head dim
//! let values = vec![0.5; 8 * 128 * 64];
//! let q = gpu.upload_floats("q", DType::F32, &shape, &values)?;
//! let k = gpu.upload_floats("k", DType::F32, &shape, &values)?;
//! let v = gpu.upload_floats("v", DType::F32, &shape, &values)?;
//! let out = gpu.empty("out", DType::F32, &shape)?;
//!
//! let mut recorder = Recorder::new(&gpu);
//! let views = [&q, &k, &v, &out].map(View::bhld);
//! let [q, k, v, out] = views;
//! let tensors = Tensors::new(q?, k?, v?, out?);
//! let options = Options { causal: true, ..Default::default() };
//! let plan = attention::record(&mut recorder, &tensors, &options)?;
//! println!("{:?}", plan.route);
//!
//! let recording = recorder.finish()?;
//! let mut encoder = gpu.device().create_command_encoder(&Default::default());
//! recording.encode(&mut encoder);
//! gpu.queue().submit([encoder.finish()]);
//! # Ok(()) }
//! ```
//!
//! **Text to text** goes from [`text::Tokenizer`] to [`model::Model::encode`], one step over the whole
//! source, whose [`model::Memory`] holds the cross-attention's keys and values of every layer, made
//! once; then a [`generate::Generator`] writes a token a step, each step one submission.
//! [`translate::Translator`] is the three of them together. Of decoder-only models,
//! [`complete::Completer`] goes on with a text, greedily or by chance.
//!
//! Which of several kernels a plan takes is settled by a table of capabilities; [`tune`] measures instead, when
//! it is asked to.
//!
//! # What holds everywhere
//!
//! - The law of scores: scale, softcap, bias and ALiBi, mask, then sinks in the denominator; a row that
//!   sees no key gives zeros.
//! - Scores, softmax state and sums are f32, whatever the storage type.
//! - What lies past a length, in padding or in unused cells of a cache, reaches no result, NaN included.
//! - What cannot be honoured is an [`Error`] that names the argument, its value and the bound.
#![warn(missing_docs)]

pub mod attention;
#[cfg(feature = "models")]
pub mod cache;
#[cfg(feature = "models")]
pub mod complete;
pub mod doctor;
pub mod error;
#[cfg(feature = "models")]
pub mod generate;
#[cfg(feature = "models")]
pub mod gguf;
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
pub mod tune;

pub use error::{Error, Result};
pub use wgpu;
