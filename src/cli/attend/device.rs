//! The tensors of the file on the device, and room for the results.

use qkv::attention::{Tensors, View};
use qkv::gpu::{DType, Gpu, Tensor};
use qkv::{Error, Result};

use super::Options;
use super::input::{Array, Input, Layout};

/// What the operator reads and writes.
pub struct OnDevice {
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Option<Tensor>,
    mask: Option<Tensor>,
    kv_len: Option<Tensor>,
    q_offset: Option<Tensor>,
    prefix_len: Option<Tensor>,
    cu_q: Option<Tensor>,
    cu_k: Option<Tensor>,
    sinks: Option<Tensor>,
    alibi: Option<Tensor>,
    t5: Option<Tensor>,
    extra: Vec<Tensor>,
    pub out: Tensor,
    pub lse: Option<Tensor>,
    pub weights: Option<Tensor>,
}

/// An optional array on the device.
fn upload<T: bytemuck::NoUninit>(
    gpu: &Gpu,
    name: &str,
    dtype: DType,
    array: &Option<Array<T>>,
) -> Result<Option<Tensor>> {
    let upload = |array: &Array<T>| {
        let bytes = bytemuck::cast_slice(&array.values);
        gpu.upload(name, dtype, &array.shape, bytes)
    };
    array.as_ref().map(upload).transpose()
}

impl OnDevice {
    pub fn new(gpu: &Gpu, input: &Input, options: &Options) -> Result<OnDevice> {
        let (storage, kv) = (options.dtype(), options.kv_dtype());
        let operand = |name, dtype: DType, array: &Array<f32>| {
            let columns = array.shape[3];
            if dtype.is_quantized() && !columns.is_multiple_of(32) {
                let stored = format!("{} for {name} of {columns} columns", dtype.name());
                let bound = "heads of whole blocks of 32";
                return Err(Error::refused("--kv-storage", stored, bound));
            }
            gpu.upload_floats(name, dtype, &array.shape, &array.values)
        };
        let extra = input.extra.iter();
        let extra =
            extra.map(|extra| gpu.upload(&extra.name, extra.dtype, &extra.shape, &extra.bytes));
        let shapes = input.shapes();
        let lse = options
            .lse
            .then(|| gpu.empty("lse", DType::F32, &shapes.lse));
        let weights = options.weights.is_some();
        let weights = weights.then(|| gpu.empty("weights", DType::F32, &shapes.weights));
        Ok(OnDevice {
            layout: input.layout,
            q: operand("q", storage, &input.q)?,
            k: operand("k", kv, &input.k)?,
            v: operand("v", kv, &input.v)?,
            bias: upload(gpu, "bias", DType::F32, &input.bias)?,
            mask: upload(gpu, "mask", DType::Bool, &input.mask)?,
            kv_len: upload(gpu, "kv_len", DType::U32, &input.kv_len)?,
            q_offset: upload(gpu, "q_offset", DType::I32, &input.q_offset)?,
            prefix_len: upload(gpu, "prefix_len", DType::U32, &input.prefix_len)?,
            cu_q: upload(gpu, "cu_q", DType::U32, &input.cu_q)?,
            cu_k: upload(gpu, "cu_k", DType::U32, &input.cu_k)?,
            sinks: upload(gpu, "sinks", DType::F32, &input.sinks)?,
            alibi: upload(gpu, "alibi", DType::F32, &input.alibi)?,
            t5: upload(gpu, "t5", DType::F32, &input.t5)?,
            extra: extra.collect::<Result<_>>()?,
            out: gpu.empty("out", storage, &shapes.out)?,
            lse: lse.transpose()?,
            weights: weights.transpose()?,
        })
    }

    /// Keys and values as they were given, or as quantised storage has them.
    pub fn keys_and_values(&self, gpu: &Gpu, input: &Input) -> Result<[Vec<f32>; 2]> {
        Ok(match self.k.dtype().is_quantized() {
            true => [gpu.read_floats(&self.k)?, gpu.read_floats(&self.v)?],
            false => [input.k.values.clone(), input.v.values.clone()],
        })
    }

    /// The operator's view of them.
    pub fn tensors<'a>(&'a self, input: &'a Input) -> Result<Tensors<'a>> {
        let view = match self.layout {
            Layout::Bhld => View::bhld,
            Layout::Blhd => View::blhd,
        };
        let cells = |tensor: &'a Option<Tensor>| -> Result<Option<View<'a>>> {
            let view = tensor.as_ref().map(|t| View::broadcast(t, input.cells()));
            view.transpose()
        };
        let names = input.extra.iter().map(|extra| extra.name.as_str());
        Ok(Tensors {
            kv_len: self.kv_len.as_ref(),
            q_offset: self.q_offset.as_ref(),
            prefix_len: self.prefix_len.as_ref(),
            cu_q: self.cu_q.as_ref(),
            cu_k: self.cu_k.as_ref(),
            bias: cells(&self.bias)?,
            mask: cells(&self.mask)?,
            alibi: self.alibi.as_ref(),
            t5: self.t5.as_ref(),
            sinks: self.sinks.as_ref(),
            extra: names.zip(&self.extra).collect(),
            weights: self.weights.as_ref(),
            lse: self.lse.as_ref(),
            ..Tensors::new(
                view(&self.q)?,
                view(&self.k)?,
                view(&self.v)?,
                view(&self.out)?,
            )
        })
    }
}
