//! Recording: dispatches as plain data, then one uniform buffer and a bind group each, then as often as
//! one likes into a command encoder, the caller's or ours. The only place that dispatches.

use super::{Gpu, shader::Shader, tensor::Tensor};
use crate::{Error, Result};

struct Dispatch {
    pipeline: wgpu::ComputePipeline,
    kernel: &'static str,
    params_at: u64,
    params_len: u64,
    bindings: Vec<Slice>,
    groups: [u32; 3],
}

/// A tensor, or those bytes of it, as a kernel sees it.
pub(crate) struct Slice {
    pub tensor: Tensor,
    pub bytes: Option<[u64; 2]>,
}

impl Slice {
    /// The bytes to bind: where none are named, the tensor's own, whatever else its buffer holds, in whole fours; of a
    /// tensor without elements as many as the largest element of a kernel's array takes.
    fn range(&self) -> [u64; 2] {
        self.bytes.unwrap_or_else(|| {
            let bytes = match self.tensor.bytes() {
                0 => 16,
                bytes => bytes.next_multiple_of(4),
            };
            [0, bytes.min(self.tensor.buffer().size() / 4 * 4)]
        })
    }
}

enum Command {
    Dispatch(Dispatch),
    Copy(Tensor, wgpu::Buffer, u64),
}

/// Collects the commands of one recording. Nothing reaches the device before [`Recorder::finish`].
pub struct Recorder<'g> {
    gpu: &'g Gpu,
    params: Vec<u8>,
    commands: Vec<Command>,
}

impl<'g> Recorder<'g> {
    /// An empty recording for that device.
    pub fn new(gpu: &'g Gpu) -> Self {
        Recorder {
            gpu,
            params: Vec::new(),
            commands: Vec::new(),
        }
    }

    /// The device that is recorded for.
    pub fn gpu(&self) -> &'g Gpu {
        self.gpu
    }

    /// The kernels of the launches so far, in order.
    pub fn kernels(&self) -> Vec<&'static str> {
        let kernel = |command: &Command| match command {
            Command::Dispatch(dispatch) => Some(dispatch.kernel),
            Command::Copy(..) => None,
        };
        self.commands.iter().filter_map(kernel).collect()
    }

    /// One launch: binding 0 is `params`, the tensors follow in order. `groups` workgroups are folded
    /// over the grid's dimensions; a kernel finds its own number with `workgroup_index`.
    pub(crate) fn dispatch<P: bytemuck::Pod>(
        &mut self,
        shader: &Shader,
        params: P,
        bindings: &[&Tensor],
        groups: u64,
    ) -> Result<()> {
        let slices = bindings.iter().map(|&tensor| Slice {
            tensor: tensor.clone(),
            bytes: None,
        });
        self.dispatch_slices(shader, params, slices.collect(), groups)
    }

    /// [`Recorder::dispatch`] on parts of tensors; an offset is a multiple of the device's alignment.
    pub(crate) fn dispatch_slices<P: bytemuck::Pod>(
        &mut self,
        shader: &Shader,
        params: P,
        bindings: Vec<Slice>,
        groups: u64,
    ) -> Result<()> {
        if groups == 0 {
            return Ok(());
        }
        let caps = self.gpu.caps();
        for slice in &bindings {
            let [from, to] = slice.range();
            let bytes = to - from;
            if bytes > caps.max_binding {
                return Err(Error::refused(
                    format!(
                        "a tensor of shape {:?} for `{}`",
                        slice.tensor.shape, shader.kernel
                    ),
                    format_args!("{bytes} bytes"),
                    format!("this device binds at most {} bytes", caps.max_binding),
                ));
            }
        }
        let groups = fold(groups, caps.max_groups).ok_or_else(|| {
            Error::refused(
                format!("the grid of `{}`", shader.kernel),
                format_args!("{groups} workgroups"),
                format!("at most {0} x {0}", caps.max_groups),
            )
        })?;
        let pipeline = self.gpu.pipeline(shader)?;
        let align = caps.uniform_align.max(16) as usize;
        self.params
            .resize(self.params.len().next_multiple_of(align), 0);
        let params_at = self.params.len() as u64;
        self.params.extend_from_slice(bytemuck::bytes_of(&params));
        self.commands.push(Command::Dispatch(Dispatch {
            pipeline,
            kernel: shader.kernel,
            params_at,
            params_len: size_of::<P>() as u64,
            bindings,
            groups,
        }));
        Ok(())
    }

    /// Copies the whole of a tensor into a buffer of the host's.
    pub(crate) fn copy(&mut self, from: &Tensor, to: &wgpu::Buffer, at: u64) {
        self.commands
            .push(Command::Copy(from.clone(), to.clone(), at));
    }

    /// Makes the uniform buffer and the bind groups; what results can be encoded any number of times.
    pub fn finish(mut self) -> Result<Recording> {
        self.params
            .resize(self.params.len().next_multiple_of(16).max(16), 0);
        let params = self.gpu.upload_uniform(&self.params)?;
        let (gpu, device) = (self.gpu, self.gpu.device());
        let commands = self.commands.into_iter();
        let mut tensors = vec![params.clone()];
        let make = || {
            commands
                .map(|command| match command {
                    Command::Copy(from, to, at) => Step::Copy(from, to, at),
                    Command::Dispatch(dispatch) => {
                        let mut entries = vec![wgpu::BindGroupEntry {
                            binding: 0,
                            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                                buffer: params.buffer(),
                                offset: dispatch.params_at,
                                size: wgpu::BufferSize::new(dispatch.params_len),
                            }),
                        }];
                        entries.extend(dispatch.bindings.iter().enumerate().map(|(ix, slice)| {
                            let [from, to] = slice.range();
                            wgpu::BindGroupEntry {
                                binding: ix as u32 + 1,
                                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                                    buffer: slice.tensor.buffer(),
                                    offset: from,
                                    size: wgpu::BufferSize::new(to - from),
                                }),
                            }
                        }));
                        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
                            label: Some(dispatch.kernel),
                            layout: &dispatch.pipeline.get_bind_group_layout(0),
                            entries: &entries,
                        });
                        gpu.count_bind_group();
                        tensors.extend(dispatch.bindings.into_iter().map(|slice| slice.tensor));
                        Step::Dispatch {
                            pipeline: dispatch.pipeline,
                            bind_group,
                            groups: dispatch.groups,
                        }
                    }
                })
                .collect()
        };
        let steps = gpu.checked("bind groups", make)?;
        Ok(Recording {
            steps,
            _tensors: tensors,
        })
    }
}

enum Step {
    Dispatch {
        pipeline: wgpu::ComputePipeline,
        bind_group: wgpu::BindGroup,
        groups: [u32; 3],
    },
    Copy(Tensor, wgpu::Buffer, u64),
}

/// Commands that are ready: encoding them makes no buffer, no bind group and no pipeline.
pub struct Recording {
    steps: Vec<Step>,
    /// What the bind groups keep on the device, so that it stays on the account.
    _tensors: Vec<Tensor>,
}

impl Recording {
    /// Writes the commands into an encoder. Nothing is submitted.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        self.encode_timed(encoder, None);
    }

    /// [`Recording::encode`], and where there are queries: the device's clock at the beginning of the
    /// first compute pass goes to query 0, and at the end of the last one to query 1.
    pub(super) fn encode_timed(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        queries: Option<&wgpu::QuerySet>,
    ) {
        let is_dispatch = |step: &Step| matches!(step, Step::Dispatch { .. });
        let first = self.steps.iter().position(is_dispatch);
        let last = self.steps.iter().rposition(is_dispatch);
        let mut steps = self.steps.iter().enumerate().peekable();
        while let Some(&(from, step)) = steps.peek() {
            if let Step::Copy(tensor, to, at) = step {
                let bytes = tensor.bytes().next_multiple_of(4);
                encoder.copy_buffer_to_buffer(tensor.buffer(), 0, to, *at, bytes);
                steps.next();
                continue;
            }
            let dispatches = self.steps[from..]
                .iter()
                .take_while(|step| is_dispatch(step));
            let to = from + dispatches.count() - 1;
            let begins = (Some(from) == first).then_some(0);
            let ends = (Some(to) == last).then_some(1);
            let timestamps = queries.filter(|_| begins.or(ends).is_some());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: None,
                timestamp_writes: timestamps.map(|query_set| wgpu::ComputePassTimestampWrites {
                    query_set,
                    beginning_of_pass_write_index: begins,
                    end_of_pass_write_index: ends,
                }),
            });
            while let Some((
                _,
                Step::Dispatch {
                    pipeline,
                    bind_group,
                    groups,
                },
            )) = steps.next_if(|(_, step)| is_dispatch(step))
            {
                pass.set_pipeline(pipeline);
                pass.set_bind_group(0, bind_group, &[]);
                pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
            }
        }
    }

    /// The number of dispatches.
    pub fn dispatches(&self) -> usize {
        self.steps
            .iter()
            .filter(|step| matches!(step, Step::Dispatch { .. }))
            .count()
    }
}

/// `n` workgroups over two dimensions of at most `max` each; the last row may be partly idle.
fn fold(n: u64, max: u32) -> Option<[u32; 3]> {
    let max = max as u64;
    let rows = n.div_ceil(max);
    if rows > max {
        return None;
    }
    Some([n.div_ceil(rows) as u32, rows as u32, 1])
}

#[cfg(test)]
mod tests {
    use super::fold;

    #[test]
    fn grids_fold_past_the_limit_and_cover_every_workgroup() {
        for n in [1, 2, 65_535, 65_536, 131_071, 1_000_003, 65_535 * 65_535] {
            let [x, y, z] = fold(n, 65_535).unwrap().map(u64::from);
            assert!(x <= 65_535 && y <= 65_535 && x * y * z >= n, "{n}");
            assert!(x * y * z - n < x, "{n}: at most one row is partly idle");
        }
        assert_eq!(fold(65_535 * 65_535 + 1, 65_535), None);
    }
}
