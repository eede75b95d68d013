//! What a device does at most, measured: what a kernel's figures are held against.

use std::time::Instant;

use super::{DType, Gpu, Recorder, Recording, Shader, Tensor};
use crate::Result;

/// The most a device does of each, in a type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Floating-point operations a second, two a multiply-add, from registers.
    pub flops: f64,
    /// Bytes a second read in order, once.
    pub read: f64,
    /// Bytes a second copied: each is read and written, and counted twice.
    pub copy: f64,
}

/// A device's measured limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// In f32.
    pub f32: Rates,
    /// In f16, where the device has it.
    pub f16: Option<Rates>,
}

/// Times each is measured at most, and seconds after which twice is enough; the fastest counts.
const TIMES: usize = 16;
const SECONDS: f64 = 1.0;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    n: u32,
    turns: u32,
    threads: u32,
    pad: u32,
}

/// Memory to stream through, and what streams: larger than caches, so that between two measurements it also
/// takes out of them what the first one left.
pub struct Stream {
    from: Tensor,
    to: Tensor,
    params: Params,
}

impl Stream {
    /// As much as shows a device's speed: 256 MiB on a processor, else 512 MiB or what one binding takes.
    pub fn new(gpu: &Gpu) -> Result<Stream> {
        let caps = gpu.caps();
        let (threads, turns, bytes) = match caps.software {
            true => (1u32 << 14, 4096, 256u64 << 20),
            false => (1 << 18, 1024, 512 << 20),
        };
        // Whole turns of every thread, in f32 and in f16.
        let turn = 8 * 16 * u64::from(threads);
        let most = bytes.min(caps.max_binding).min(caps.max_buffer);
        let bytes = (most / turn).max(1) * turn;
        let make = |label| gpu.empty(label, DType::F32, &[(bytes / 4) as u32]);
        Ok(Stream {
            from: make("streamed from")?,
            to: make("streamed to")?,
            params: Params {
                n: (bytes / 16) as u32,
                turns,
                threads,
                pad: 0,
            },
        })
    }

    fn record(&self, gpu: &Gpu, work: &'static str, dtype: DType) -> Result<Recording> {
        let shader = Shader::new("limits")
            .with("F16", dtype == DType::F16)
            .with("T", dtype.name())
            .with("WORK", work);
        let params = Params {
            n: self.vectors(dtype),
            ..self.params
        };
        let groups = u64::from(params.threads / 64);
        let mut recorder = Recorder::new(gpu);
        recorder.dispatch(&shader, params, &[&self.from, &self.to], groups)?;
        recorder.finish()
    }

    /// vec4s of the memory.
    fn vectors(&self, dtype: DType) -> u32 {
        self.params.n * 4 / dtype.size() as u32
    }

    /// Reads it all, once.
    pub fn reading(&self, gpu: &Gpu) -> Result<Recording> {
        self.record(gpu, "read", DType::F32)
    }

    /// What the device does at most.
    pub fn limits(&self, gpu: &Gpu) -> Result<Limits> {
        let seconds = |work, dtype| -> Result<f64> {
            let recording = self.record(gpu, work, dtype)?;
            let mut least = f64::INFINITY;
            let started = Instant::now();
            for time in 0..TIMES {
                if time >= 2 && started.elapsed().as_secs_f64() > SECONDS {
                    break;
                }
                // A clock too coarse to see it would give no rate.
                least = least.min(gpu.time(&recording)?.as_secs_f64().max(1e-9));
            }
            Ok(least)
        };
        let rates = |dtype: DType| -> Result<Rates> {
            let Params { turns, threads, .. } = self.params;
            let bytes = 4.0 * f64::from(self.vectors(dtype)) * dtype.size() as f64;
            let flop = 2.0 * 16.0 * f64::from(turns) * f64::from(threads);
            Ok(Rates {
                flops: flop / seconds("multiply_adds", dtype)?,
                read: bytes / seconds("read", dtype)?,
                copy: 2.0 * bytes / seconds("copy", dtype)?,
            })
        };
        Ok(Limits {
            f32: rates(DType::F32)?,
            f16: gpu.caps().f16.then(|| rates(DType::F16)).transpose()?,
        })
    }
}
