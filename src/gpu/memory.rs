//! Tensors in a device's memory: made, filled, written and read.

use std::sync::Arc;

use super::tensor::Storage;
use super::{DType, Gpu, Recorder, Tensor, blocks};
use crate::{Error, Result};

const TENSOR: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::COPY_SRC)
    .union(wgpu::BufferUsages::COPY_DST);

impl Gpu {
    pub(super) fn buffer(
        &self,
        label: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
        contents: Option<&mut dyn FnMut(&mut wgpu::BufferViewMut)>,
    ) -> Result<wgpu::Buffer> {
        let size = bytes
            .checked_next_multiple_of(16)
            .unwrap_or(u64::MAX)
            .max(16);
        if size > self.caps().max_buffer {
            return Err(Error::OutOfMemory(format!(
                "{label}: {size} bytes in one buffer; this device allows {}",
                self.caps().max_buffer
            )));
        }
        let buffer = self.checked(label, || {
            self.0.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage,
                mapped_at_creation: contents.is_some(),
            })
        })?;
        if let Some(fill) = contents {
            let mut view = buffer
                .get_mapped_range_mut(..)
                .map_err(|e| Error::OutOfMemory(format!("{label}: {e}")))?;
            fill(&mut view);
            drop(view);
            buffer.unmap();
        }
        Ok(buffer)
    }

    fn tensor(&self, buffer: wgpu::Buffer, dtype: DType, shape: &[u32]) -> Tensor {
        self.0.stats.allocated(buffer.size());
        Tensor {
            storage: Arc::new(Storage {
                buffer,
                account: Some(self.0.stats.clone()),
            }),
            dtype,
            shape: shape.to_vec(),
        }
    }

    /// A tensor of zeros.
    pub fn empty(&self, label: &str, dtype: DType, shape: &[u32]) -> Result<Tensor> {
        let bytes = dtype.bytes(shape);
        Ok(self.tensor(self.buffer(label, bytes, TENSOR, None)?, dtype, shape))
    }

    /// A tensor with those elements, `bytes` of them in the tensor's type.
    pub fn upload(&self, label: &str, dtype: DType, shape: &[u32], bytes: &[u8]) -> Result<Tensor> {
        let need = dtype.bytes(shape);
        if bytes.len() as u64 != need {
            return Err(Error::refused(
                label,
                format_args!("{} bytes", bytes.len()),
                format!("the shape {shape:?} takes {need}"),
            ));
        }
        let mut fill = |view: &mut wgpu::BufferViewMut| {
            view.slice(..bytes.len()).copy_from_slice(bytes);
        };
        let buffer = self.buffer(label, need, TENSOR, Some(&mut fill))?;
        Ok(self.tensor(buffer, dtype, shape))
    }

    /// A tensor of floats, stored as `dtype`.
    pub fn upload_floats(
        &self,
        label: &str,
        dtype: DType,
        shape: &[u32],
        values: &[f32],
    ) -> Result<Tensor> {
        match dtype {
            DType::F16 => {
                let halves: Vec<half::f16> =
                    values.iter().map(|&x| half::f16::from_f32(x)).collect();
                self.upload(label, dtype, shape, bytemuck::cast_slice(&halves))
            }
            DType::BF16 => {
                let halves: Vec<half::bf16> =
                    values.iter().map(|&x| half::bf16::from_f32(x)).collect();
                self.upload(label, dtype, shape, bytemuck::cast_slice(&halves))
            }
            DType::Q8_0 | DType::Q4_0 => {
                let columns = shape.last().copied().unwrap_or(0);
                let words = blocks::quantize(dtype, columns, values);
                self.upload(label, dtype, shape, bytemuck::cast_slice(&words))
            }
            _ => self.upload(label, dtype, shape, bytemuck::cast_slice(values)),
        }
    }

    /// A tensor of unsigned integers.
    pub fn upload_u32(&self, label: &str, shape: &[u32], values: &[u32]) -> Result<Tensor> {
        self.upload(label, DType::U32, shape, bytemuck::cast_slice(values))
    }

    pub(crate) fn upload_uniform(&self, bytes: &[u8]) -> Result<Tensor> {
        let mut fill = |view: &mut wgpu::BufferViewMut| {
            view.slice(..bytes.len()).copy_from_slice(bytes);
        };
        let usage = wgpu::BufferUsages::UNIFORM;
        let buffer = self.buffer("params", bytes.len() as u64, usage, Some(&mut fill))?;
        Ok(self.tensor(buffer, DType::U32, &[bytes.len() as u32 / 4]))
    }

    /// A buffer that the host can read.
    pub(crate) fn staging(&self, bytes: u64) -> Result<Tensor> {
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let buffer = self.buffer("staging", bytes, usage, None)?;
        Ok(self.tensor(buffer, DType::U32, &[bytes.div_ceil(4) as u32]))
    }

    /// Writes elements, bytes of the tensor's type, from its first on; they are there for what is
    /// submitted next.
    ///
    /// # Errors
    /// [`Error::Refused`] for more bytes than the tensor has, for a number of them that is not whole fours, and
    /// for a buffer of the caller's without `COPY_DST` usage.
    pub fn write(&self, tensor: &Tensor, bytes: &[u8]) -> Result<()> {
        self.write_at(tensor, 0, bytes)
    }

    /// [`Gpu::write`] from byte `at` of the tensor on.
    ///
    /// # Errors
    /// [`Error::Refused`] for bytes past the tensor's end, for a place or a number of them that is not whole
    /// fours, and for a buffer of the caller's without `COPY_DST` usage.
    pub fn write_at(&self, tensor: &Tensor, at: u64, bytes: &[u8]) -> Result<()> {
        let (n, most) = (bytes.len() as u64, tensor.bytes());
        if at.saturating_add(n) > most || !n.is_multiple_of(4) || !at.is_multiple_of(4) {
            let bound = format!("within {most}, in whole fours");
            return Err(Error::refused(
                "what is written",
                format_args!("{n} bytes at {at}"),
                bound,
            ));
        }
        tensor.copies("what is written to", wgpu::BufferUsages::COPY_DST)?;
        self.checked("a write", || {
            self.0.queue.write_buffer(tensor.buffer(), at, bytes);
        })
    }

    /// The bytes of a tensor. Waits for everything submitted before.
    ///
    /// # Errors
    /// [`Error::Refused`] for a buffer of the caller's without `COPY_SRC` usage.
    pub fn read(&self, tensor: &Tensor) -> Result<Vec<u8>> {
        tensor.copies("what is read", wgpu::BufferUsages::COPY_SRC)?;
        let bytes = tensor.bytes();
        let staging = self.staging(bytes)?;
        let mut recorder = Recorder::new(self);
        recorder.copy(tensor, staging.buffer(), 0);
        let recording = recorder.finish()?;
        self.run_and_read(&recording, &staging, |view| view[..bytes as usize].to_vec())
    }

    /// The elements of a tensor of floats.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn read_floats(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        let bytes = self.read(tensor)?;
        Ok(match tensor.dtype {
            DType::F16 => bytes
                .chunks_exact(2)
                .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            DType::BF16 => bytes
                .chunks_exact(2)
                .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            DType::Q8_0 | DType::Q4_0 => {
                let columns = tensor.shape.last().copied().unwrap_or(0);
                let words: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
                blocks::dequantize(tensor.dtype, columns, &words)
            }
            _ => bytemuck::pod_collect_to_vec(&bytes),
        })
    }

    /// The elements of a tensor of unsigned integers.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn read_u32(&self, tensor: &Tensor) -> Result<Vec<u32>> {
        Ok(bytemuck::pod_collect_to_vec(&self.read(tensor)?))
    }
}
