//! Whether the prefill route's products go to cooperative matrices, and in which form.

use super::super::problem::Problem;
use crate::gpu::{Caps, DType};

/// Subgroups of a workgroup; the kernel has the number too.
const SUBGROUPS: u32 = 4;
/// Rows of a subgroup.
const ROWS: u32 = 16;
/// Keys of a tile.
pub(super) const BLOCK_K: u32 = 32;
/// Head dims for whose operands registers and workgroup memory are there.
const DIMS: std::ops::RangeInclusive<u32> = 8..=128;
/// Value columns of a workgroup; more of them take more workgroups.
const V_BLOCK: u32 = 128;

/// The form of `prefill_coop` for a problem on a device.
#[derive(Clone, Copy)]
pub(super) struct Coop {
    /// Rows and columns of a matrix.
    pub(super) m: u32,
    /// Threads of a subgroup, where subgroups are as large as they may be.
    pub(super) lanes: u32,
    /// Whether they always are.
    pub(super) fixed: bool,
    /// Matrices along D, and along a workgroup's share of Dv.
    pub(super) d_tiles: u32,
    pub(super) v_tiles: u32,
    /// Whether plain loops stand for the matrices.
    pub(super) plain: bool,
}

impl Coop {
    /// `None` where the device has no such matrices or the problem does not fit them.
    pub(super) fn new(problem: &Problem, caps: &Caps) -> Option<Coop> {
        let [q, k, v, _] = problem.types;
        let (d, dv) = (problem.head_dim(), problem.value_dim());
        let plain = caps.plain_matrices;
        if [q, k, v] != [DType::F16; 3]
            || !DIMS.contains(&d)
            || dv < *DIMS.start()
            || caps.software && !plain
        {
            return None;
        }
        // f16 operands and f32 sums, in a size that WGSL can name.
        let m = [16, 8].into_iter().find(|&m| {
            caps.cooperative.iter().any(|shape| {
                [shape.m, shape.n, shape.k] == [m; 3] && shape.ab == "f16" && shape.cr == "f32"
            })
        })?;
        let (least, most) = caps.subgroups?;
        let lanes = if plain { 32 } else { most };
        let coop = Coop {
            m,
            lanes,
            fixed: least == most,
            d_tiles: d.div_ceil(m),
            v_tiles: dv.min(V_BLOCK).div_ceil(m),
            plain,
        };
        let fits = least >= 4
            && (16..=64).contains(&lanes)
            && lanes.is_power_of_two()
            && SUBGROUPS * lanes <= caps.invocations
            && coop.memory() <= caps.workgroup_memory;
        fits.then_some(coop)
    }

    /// Rows of a workgroup.
    pub(super) fn block_q(self) -> u32 {
        SUBGROUPS * ROWS
    }

    /// Value columns of a workgroup.
    pub(super) fn columns(self) -> u32 {
        self.v_tiles * self.m
    }

    /// Matrices along a subgroup's rows.
    pub(super) fn tiles(self) -> u32 {
        ROWS / self.m
    }

    /// Turns of a tile's products by plain loops, all that they load and store among them.
    pub(super) fn turns(self) -> u32 {
        let products = (self.d_tiles + self.v_tiles) * self.tiles() * (BLOCK_K / self.m);
        products * (self.m * self.m / self.lanes * (self.m + 2))
    }

    /// Bytes of workgroup memory: a tile of K, one of V, weights, scores.
    fn memory(self) -> u32 {
        let k = BLOCK_K * (self.d_tiles * self.m + 8) * 2;
        let v = self.columns() * (BLOCK_K + 8) * 2;
        let p = self.block_q() * (BLOCK_K + 8) * 2;
        k + v + p + self.block_q() * BLOCK_K * 4 + 16
    }
}
