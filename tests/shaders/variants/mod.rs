//! Every variant of every kernel that plans and operations ask for.

use qkv::gpu::{CoopShape, DType, Matrices};

mod around;
mod attention;

pub use around::{other_variants, others_of};
pub use attention::{attention_of, attention_variants};

/// Smallest and largest subgroups of devices there are; none at all comes last.
const SUBGROUPS: [Option<(u32, u32)>; 7] = [
    Some((4, 4)),
    Some((8, 8)),
    Some((8, 32)),
    Some((32, 32)),
    Some((32, 64)),
    Some((128, 128)),
    None,
];

/// What kernels depend on of a device: subgroups, rows of cooperative matrices (none: 0), and what stands for
/// these.
#[derive(Clone, Copy, PartialEq)]
pub struct Device(Option<(u32, u32)>, u32, Matrices);

/// Devices with cooperative matrices.
const MATRICES: [Device; 5] = [
    Device(Some((32, 32)), 16, Matrices::Used),
    Device(Some((32, 64)), 16, Matrices::Used),
    Device(Some((32, 32)), 8, Matrices::Used),
    Device(Some((8, 8)), 16, Matrices::Plain),
    Device(Some((8, 8)), 8, Matrices::Plain),
];

/// The shape of square matrices with f16 operands and f32 sums.
pub fn matrix(m: u32) -> CoopShape {
    CoopShape {
        m,
        n: m,
        k: m,
        ab: "f16".into(),
        cr: "f32".into(),
    }
}

pub const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

const FLOATS: [&str; 2] = ["f32", "f16"];
const BOTH: [bool; 2] = [false, true];
const VECTORS: [u32; 2] = [1, 4];

/// GPUs whose compilers benches/peers/compilers.py asks, each with what the plan may see of it: what its driver
/// reports, without its matrices, and without subgroups.
pub const GPUS: [(&str, &[Device]); 4] = [
    (
        "navi21",
        &[
            Device(Some((32, 64)), 0, Matrices::Unused),
            Device(None, 0, Matrices::Unused),
        ],
    ),
    (
        "navi31",
        &[
            Device(Some((32, 64)), 16, Matrices::Used),
            Device(Some((32, 64)), 0, Matrices::Unused),
            Device(None, 0, Matrices::Unused),
        ],
    ),
    (
        "vega10",
        &[
            Device(Some((64, 64)), 0, Matrices::Unused),
            Device(None, 0, Matrices::Unused),
        ],
    ),
    (
        "dg2",
        &[
            Device(Some((8, 32)), 0, Matrices::Unused),
            Device(None, 0, Matrices::Unused),
        ],
    ),
];
