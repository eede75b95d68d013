//! Small hard problems, each on the device beside the oracle.

use crate::Result;
use crate::attention::{Options, Route, Tensors, View, record};
use crate::gpu::{DType, Gpu, Recorder, Tensor};
use crate::reference::{self, Attention};

use super::{Outcome, Tolerance};

/// What is hard about a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hard {
    /// Lengths of no key, one, some and all, causal; D and Dv apart.
    Lengths,
    /// The same with scores of about 1e4 either way, exact ties among them.
    Loud,
    /// The lengths with odd head dims, which no load of four fits, and grouped heads.
    Odd,
    /// Whole blocks of keys masked at a row's beginning, and whole rows; a window; sinks.
    Masked,
    /// One query on many keys in three parts, the last of which is partly past the length.
    Parts,
    /// Several matrices along D and Dv, several blocks of rows and of keys, scores that grow along the keys.
    Wide,
}

impl Hard {
    /// All of them.
    pub const ALL: [Hard; 6] = [
        Hard::Lengths,
        Hard::Loud,
        Hard::Odd,
        Hard::Masked,
        Hard::Parts,
        Hard::Wide,
    ];

    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Hard::Lengths => "lengths",
            Hard::Loud => "loud",
            Hard::Odd => "odd",
            Hard::Masked => "masked",
            Hard::Parts => "parts",
            Hard::Wide => "wide",
        }
    }

    fn shape(self) -> Shape {
        let shape = |batch, heads, q_len, k_len, dims| Shape {
            batch,
            heads,
            q_len,
            k_len,
            dims,
        };
        match self {
            Hard::Lengths | Hard::Loud => shape(4, [2, 2], 2, 70, [12, 8]),
            Hard::Odd => shape(4, [4, 2], 5, 70, [11, 7]),
            Hard::Masked => shape(2, [2, 1], 70, 130, [16, 16]),
            Hard::Parts => shape(1, [8, 1], 1, 1500, [40, 24]),
            Hard::Wide => shape(2, [2, 1], 70, 130, [40, 48]),
        }
    }
}

struct Shape {
    batch: usize,
    /// Query heads; KV heads.
    heads: [usize; 2],
    q_len: usize,
    k_len: usize,
    /// D; Dv.
    dims: [usize; 2],
}

/// Cells between rows: after each, up to whole blocks of quants, lie some that nothing may read or write.
fn stride(columns: usize) -> usize {
    (columns + 1).next_multiple_of(32)
}

/// What lies where nothing may be written.
const CANARY: f32 = -7.25;

/// Numbers in -1 .. 1, the same in every run.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A problem on the device, and the oracle's answer.
pub(super) struct Prepared {
    storage: [DType; 2],
    shape: Shape,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Option<Tensor>,
    mask: Option<Tensor>,
    sinks: Option<Tensor>,
    want: Vec<f64>,
    want_lse: Vec<f64>,
}

/// Rows of `columns` values, `stride` apart, as their storage type has them; NaN between them where that is
/// a float, zero where it is a quant.
fn upload(
    gpu: &Gpu,
    dtype: DType,
    extents: [usize; 4],
    mut value: impl FnMut() -> f32,
    is_poison: impl Fn([usize; 3]) -> bool,
) -> Result<(Tensor, Vec<f64>)> {
    let [b, h, l, d] = extents;
    let gap = if dtype.is_quantized() { 0.0 } else { f32::NAN };
    let mut cells = Vec::new();
    for at in 0..b * h * l {
        let poison = is_poison([at / (h * l), at / l % h, at % l]);
        cells.extend((0..d).map(|_| if poison { f32::NAN } else { value() }));
        cells.resize((at + 1) * stride(d), gap);
    }
    let shape = [b, h, l, stride(d)].map(|n| n as u32);
    let tensor = gpu.upload_floats("a problem of the doctor's", dtype, &shape, &cells)?;
    let stored = gpu.read_floats(&tensor)?;
    let rows = stored.chunks(stride(d));
    let values = rows.flat_map(|row| row[..d].iter().map(|&x| f64::from(x)));
    Ok((tensor, values.collect()))
}

fn view(tensor: &Tensor, columns: usize) -> Result<View<'_>> {
    let &[b, h, l, stride] = tensor.shape() else {
        unreachable!("tensors of the doctor's have four extents")
    };
    let row = l * stride;
    let extents = [b, h, l, columns as u32];
    View::new(tensor, extents, 0, [h * row, row, stride])
}

impl Prepared {
    /// The problem with q and out stored as `own`, k and v as `cached`.
    pub fn new(gpu: &Gpu, hard: Hard, [own, cached]: [DType; 2]) -> Result<Prepared> {
        let shape = hard.shape();
        let Shape {
            batch,
            heads: [h, hk],
            q_len,
            k_len,
            dims: [d, dv],
        } = shape;
        let lengths: Option<Vec<usize>> = match hard {
            Hard::Lengths | Hard::Loud | Hard::Odd => Some(vec![0, 1, 37, 70]),
            Hard::Masked => None,
            Hard::Parts => Some(vec![1283]),
            Hard::Wide => Some(vec![130, 99]),
        };
        let past = |[b, _, j]: [usize; 3]| lengths.as_ref().is_some_and(|all| j >= all[b]);
        let (mut q_noise, mut k_noise, v_noise) = (noise(1), noise(2), noise(3));
        // Loud scores are whole multiples of 64, which no order of sums rounds: two keys tie exactly, or one
        // of them has no weight.
        let loud = hard == Hard::Loud;
        let q_value = || match loud {
            true => 64.0 * (64.0 * q_noise()).round(),
            false => 3.0 * q_noise(),
        };
        let mut n = 0;
        let k_value = || {
            n += 1;
            match hard {
                Hard::Loud => (1.5 * k_noise()).round(),
                Hard::Wide => k_noise() * (1.0 + (n / d % k_len) as f32 / 8.0),
                _ => k_noise(),
            }
        };
        let (q, q_values) = upload(gpu, own, [batch, h, q_len, d], q_value, |_| false)?;
        let (k, k_values) = upload(gpu, cached, [batch, hk, k_len, d], k_value, past)?;
        let (v, v_values) = upload(gpu, cached, [batch, hk, k_len, dv], v_noise, past)?;

        // Row 1 sees no key, row 2 only the last one, the others nothing before key 66 but every third row.
        let sees = |i: usize, j: usize| match i {
            1 => false,
            2 => j == k_len - 1,
            i if i % 3 == 0 => j % 5 != 2,
            _ => j >= 66,
        };
        let masked = hard == Hard::Masked;
        let options = Options {
            causal: matches!(hard, Hard::Lengths | Hard::Loud | Hard::Odd | Hard::Wide),
            scale: loud.then_some(1.0),
            window: if masked { [Some(100), None] } else { [None; 2] },
            ..Options::default()
        };
        let sinks: Option<Vec<f32>> = masked.then(|| vec![0.75; h]);
        let wide_sinks: Option<Vec<f64>> = masked.then(|| vec![0.75; h]);
        let cells =
            masked.then(|| reference::expand([batch, h, q_len, k_len], |_, _, i, j| sees(i, j)));
        let plain = Attention::new(
            [batch, h, q_len, d],
            [batch, hk, k_len, dv],
            &q_values,
            &k_values,
            &v_values,
        );
        let want = reference::attention(&Attention {
            scale: options.scale.map_or(plain.scale, f64::from),
            causal: options.causal,
            window: (options.window[0].map_or(-1, i64::from), -1),
            mask: cells.as_deref(),
            kv_len: lengths.as_deref(),
            sinks: wide_sinks.as_deref(),
            ..plain
        });

        let kv_len = lengths.map(|lengths| {
            let lengths: Vec<u32> = lengths.iter().map(|&n| n as u32).collect();
            gpu.upload_u32("kv_len", &[lengths.len() as u32], &lengths)
        });
        let mask = masked.then(|| {
            let bytes: Vec<u8> = (0..q_len * k_len)
                .map(|at| sees(at / k_len, at % k_len).into())
                .collect();
            let shape = [1, 1, q_len as u32, k_len as u32];
            gpu.upload("mask", DType::Bool, &shape, &bytes)
        });
        let sinks = sinks
            .map(|values| gpu.upload_floats("sinks", DType::F32, &[values.len() as u32], &values));
        Ok(Prepared {
            storage: [own, cached],
            shape,
            options,
            q,
            k,
            v,
            kv_len: kv_len.transpose()?,
            mask: mask.transpose()?,
            sinks: sinks.transpose()?,
            want: want.out,
            want_lse: want.lse,
        })
    }

    /// Runs it on a route, with [`Options::f16_math`] or without: its kernels, and the worst error in units of the
    /// tolerance, or what is wrong.
    pub fn run(
        &self,
        gpu: &Gpu,
        route: Route,
        f16_math: bool,
    ) -> Result<(Vec<&'static str>, Outcome)> {
        let Shape {
            batch,
            heads: [h, _],
            q_len,
            k_len,
            dims: [d, dv],
        } = self.shape;
        let rows = [batch, h, q_len].map(|n| n as u32);
        let canaries = vec![CANARY; batch * h * q_len * stride(dv)];
        let shape = [rows[0], rows[1], rows[2], stride(dv) as u32];
        let out = gpu.upload_floats("out", self.storage[0], &shape, &canaries)?;
        let lse = gpu.empty("lse", DType::F32, &rows)?;
        let mut tensors = Tensors::new(
            view(&self.q, d)?,
            view(&self.k, d)?,
            view(&self.v, dv)?,
            view(&out, dv)?,
        );
        tensors.lse = Some(&lse);
        tensors.kv_len = self.kv_len.as_ref();
        tensors.sinks = self.sinks.as_ref();
        let extents = [rows[0], rows[1], rows[2], k_len as u32];
        let mask = self
            .mask
            .as_ref()
            .map(|mask| View::broadcast(mask, extents));
        tensors.mask = mask.transpose()?;
        let options = Options {
            route: Some(route),
            splits: (k_len > 1000 && route == Route::Decode).then_some(3),
            f16_math,
            ..self.options.clone()
        };
        let mut recorder = Recorder::new(gpu);
        let plan = record(&mut recorder, &tensors, &options)?;
        gpu.run(&recorder.finish()?)?;
        let got = gpu.read_floats(&out)?;
        let got_lse = gpu.read_floats(&lse)?;
        let kernels = plan.launches.iter().map(|launch| launch.shader.kernel);
        Ok((kernels.collect(), self.judge(&got, &got_lse, f16_math)))
    }

    fn judge(&self, got: &[f32], got_lse: &[f32], f16_math: bool) -> Outcome {
        let [_, dv] = self.shape.dims;
        let k_len = self.shape.k_len as u32;
        let plain = Tolerance::new(self.storage[0], k_len);
        // Weights and products are rounded before the output is.
        let coarse = if f16_math { 4.0 } else { 1.0 };
        let tolerance = Tolerance {
            atol: coarse * plain.atol,
            rtol: coarse * plain.rtol,
        };
        let mut worst: f64 = 0.0;
        for (row, (cells, want)) in got.chunks(stride(dv)).zip(self.want.chunks(dv)).enumerate() {
            let (values, beside) = cells.split_at(dv);
            let error = tolerance.worst(values, want);
            if error > 1.0 {
                return Err(format!(
                    "row {row} is off by {error:.3} of what is allowed: {values:?} for {want:.6?}"
                ));
            }
            if beside.iter().any(|&x| x != CANARY) {
                return Err(format!("row {row} was written past its end"));
            }
            worst = worst.max(error);
        }
        let tolerance = Tolerance::new(DType::F32, k_len);
        for (row, (got, want)) in got_lse.chunks(1).zip(self.want_lse.chunks(1)).enumerate() {
            let error = tolerance.worst(got, want);
            if error > 1.0 {
                return Err(format!("row {row}: an LSE of {} for {}", got[0], want[0]));
            }
            worst = worst.max(error);
        }
        Ok(worst)
    }
}
