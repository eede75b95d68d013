//! What a device can do, as plain data: plans are made from it, tests narrow it.

use super::Shader;

/// One cooperative-matrix shape the adapter reports, as text for people and plans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoopShape {
    /// Rows of A and C.
    pub m: u32,
    /// Columns of B and C.
    pub n: u32,
    /// Columns of A, rows of B.
    pub k: u32,
    /// Type of A and B.
    pub ab: String,
    /// Type of C and of the result.
    pub cr: String,
}

/// Subgroups of a workgroup of kernels on cooperative matrices, and its workgroup memory: what every device
/// with such matrices has.
pub(crate) const MATRIX_SUBGROUPS: u32 = 4;
const MATRIX_MEMORY: u32 = 32 << 10;

/// The cooperative matrices of a device as kernels use them.
#[derive(Clone, Copy)]
pub(crate) struct MatrixForm {
    /// Rows and columns of a matrix.
    pub rows: u32,
    /// Threads of a subgroup, where subgroups are as large as they may be.
    pub lanes: u32,
    /// Whether they always are.
    fixed: bool,
    /// Whether plain loops stand for the matrices.
    plain: bool,
}

impl MatrixForm {
    /// The constants of shaders/shared/matrices.wgsl.
    pub(crate) fn constants(self, shader: Shader) -> Shader {
        shader
            .with("M", self.rows)
            .with("LANES", self.lanes)
            .with("FIXED", self.fixed)
            .with("PLAIN", self.plain)
    }
}

/// What kernels for cooperative matrices multiply on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Matrices {
    /// Such kernels are not used: nobody has seen them give right answers here.
    #[default]
    Unused,
    /// The device's matrices, which were right.
    Used,
    /// Plain loops, which any device with `f16` and subgroups has: slower than its other kernels, and how those
    /// for matrices are tested where there are none.
    Plain,
}

/// The powers and limits of a device. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    /// The adapter's name.
    pub name: String,
    /// `f16` in shaders and in storage buffers.
    pub f16: bool,
    /// Products in `f16` (`Options::f16_math`), unless the doctor found them wrong.
    pub f16_math: bool,
    /// Smallest and largest subgroup size, where subgroup operations exist.
    pub subgroups: Option<(u32, u32)>,
    /// Cooperative-matrix shapes.
    pub cooperative: Vec<CoopShape>,
    /// Whether kernels use them.
    pub matrices: Matrices,
    /// Timestamps at the edges of compute passes.
    pub timestamps: bool,
    /// Workgroup memory.
    pub workgroup_memory: u32,
    /// Threads in a workgroup.
    pub invocations: u32,
    /// Storage buffers one kernel may bind.
    pub storage_buffers: u32,
    /// Largest storage binding.
    pub max_binding: u64,
    /// Largest buffer.
    pub max_buffer: u64,
    /// Workgroups along one dimension of a grid.
    pub max_groups: u32,
    /// Alignment of a uniform binding's offset.
    pub uniform_align: u32,
    /// Alignment of a storage binding's offset.
    pub storage_align: u32,
    /// Whether the device is a processor that runs shaders in software.
    pub software: bool,
}

impl Caps {
    pub(crate) fn new(
        info: wgpu::AdapterInfo,
        features: wgpu::Features,
        limits: wgpu::Limits,
        cooperative: Vec<CoopShape>,
    ) -> Self {
        Caps {
            name: info.name,
            f16: features.contains(wgpu::Features::SHADER_F16),
            f16_math: features.contains(wgpu::Features::SHADER_F16),
            subgroups: features
                .contains(wgpu::Features::SUBGROUP)
                .then_some((info.subgroup_min_size, info.subgroup_max_size)),
            cooperative: match features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
                true => cooperative,
                false => Vec::new(),
            },
            matrices: Matrices::Unused,
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            invocations: limits.max_compute_invocations_per_workgroup,
            storage_buffers: limits.max_storage_buffers_per_shader_stage,
            max_binding: limits.max_storage_buffer_binding_size,
            max_buffer: limits.max_buffer_size,
            max_groups: limits.max_compute_workgroups_per_dimension,
            uniform_align: limits.min_uniform_buffer_offset_alignment,
            storage_align: limits.min_storage_buffer_offset_alignment,
            software: info.device_type == wgpu::DeviceType::Cpu,
        }
    }

    /// The square cooperative matrices that kernels use, with operands in `f16` and sums in f32; `None` where they
    /// use none: the device reports none of a size that WGSL can name, lacks what else those kernels need, is a
    /// processor, whose matrices are no faster than its lanes, or gives wrong answers.
    pub(crate) fn matrix_form(&self) -> Option<MatrixForm> {
        let (least, most) = self.subgroups?;
        let (lanes, able) = match self.matrices {
            Matrices::Unused => return None,
            Matrices::Used => (most, !self.software),
            Matrices::Plain => (32, true),
        };
        let able = able
            && self.f16
            && least >= 4
            && (16..=64).contains(&lanes)
            && lanes.is_power_of_two()
            && MATRIX_SUBGROUPS * lanes <= self.invocations
            && MATRIX_MEMORY <= self.workgroup_memory;
        let square = |m: u32| {
            let mut shapes = self.cooperative.iter();
            shapes.any(|shape| {
                [shape.m, shape.n, shape.k] == [m; 3] && shape.ab == "f16" && shape.cr == "f32"
            })
        };
        let rows = [16, 8].into_iter().find(|&m| able && square(m))?;
        Some(MatrixForm {
            rows,
            lanes,
            fixed: least == most,
            plain: self.matrices == Matrices::Plain,
        })
    }

    /// These powers with cooperative matrices in use, for what checks them.
    pub(crate) fn with_matrices(&self) -> Self {
        let matrices = match self.matrices {
            Matrices::Unused => Matrices::Used,
            used => used,
        };
        Caps {
            matrices,
            ..self.clone()
        }
    }

    /// These powers without cooperative matrices in use.
    pub fn without_matrices(&self) -> Self {
        Caps {
            matrices: Matrices::Unused,
            ..self.clone()
        }
    }

    /// These powers without products in `f16`.
    pub fn without_f16_math(&self) -> Self {
        Caps {
            f16_math: false,
            ..self.clone()
        }
    }

    /// These powers without `f16`.
    pub fn without_f16(&self) -> Self {
        Caps {
            f16: false,
            f16_math: false,
            ..self.clone()
        }
    }

    /// These powers without subgroup operations.
    pub fn without_subgroups(&self) -> Self {
        Caps {
            subgroups: None,
            ..self.clone()
        }
    }

    /// These powers cut down to what every WebGPU implementation grants, without optional features.
    pub fn browser(&self) -> Self {
        let least = wgpu::Limits::default();
        Caps {
            name: self.name.clone(),
            f16: false,
            f16_math: false,
            subgroups: None,
            cooperative: Vec::new(),
            matrices: Matrices::Unused,
            timestamps: false,
            workgroup_memory: least
                .max_compute_workgroup_storage_size
                .min(self.workgroup_memory),
            invocations: least
                .max_compute_invocations_per_workgroup
                .min(self.invocations),
            storage_buffers: least
                .max_storage_buffers_per_shader_stage
                .min(self.storage_buffers),
            max_binding: least.max_storage_buffer_binding_size.min(self.max_binding),
            max_buffer: least.max_buffer_size.min(self.max_buffer),
            max_groups: least
                .max_compute_workgroups_per_dimension
                .min(self.max_groups),
            uniform_align: least
                .min_uniform_buffer_offset_alignment
                .max(self.uniform_align),
            storage_align: least
                .min_storage_buffer_offset_alignment
                .max(self.storage_align),
            software: self.software,
        }
    }
}
