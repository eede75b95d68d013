//! Recording: dispatches as plain data, then one uniform buffer and a bind group each, then as often as
//! one likes into a command encoder, the caller's or ours. The only place that dispatches.

use super::{Gpu, shader::Shader, tensor::Tensor};
use crate::{Error, Result};

struct Dispatch {
    pipeline: wgpu::ComputePipeline,
    kernel: &'static str,
    params_at: u64,
    params_len: u64,
    bindings: Vec<Tensor>,
    groups: [u32; 3],
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

    /// One launch: binding 0 is `params`, the tensors follow in order. `groups` workgroups are folded
    /// over the grid's dimensions; a kernel finds its own number with `workgroup_index`.
    pub(crate) fn dispatch<P: bytemuck::Pod>(
        &mut self,
        shader: &Shader,
        params: P,
        bindings: &[&Tensor],
        groups: u64,
    ) -> Result<()> {
        if groups == 0 {
            return Ok(());
        }
        let caps = self.gpu.caps();
        for tensor in bindings {
            let bytes = tensor.buffer().size();
            if bytes > caps.max_binding {
                return Err(Error::refused(
                    format!(
                        "a tensor of shape {:?} for `{}`",
                        tensor.shape, shader.kernel
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
            bindings: bindings.iter().map(|&t| t.clone()).collect(),
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
                        entries.extend(dispatch.bindings.iter().enumerate().map(|(ix, tensor)| {
                            wgpu::BindGroupEntry {
                                binding: ix as u32 + 1,
                                resource: tensor.buffer().as_entire_binding(),
                            }
                        }));
                        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
                            label: Some(dispatch.kernel),
                            layout: &dispatch.pipeline.get_bind_group_layout(0),
                            entries: &entries,
                        });
                        gpu.count_bind_group();
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
            _params: params,
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
    _params: Tensor,
}

impl Recording {
    /// Writes the commands into an encoder. Nothing is submitted.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut steps = self.steps.iter().peekable();
        while let Some(step) = steps.peek() {
            match step {
                Step::Copy(from, to, at) => {
                    let bytes = (from.len() * from.dtype.size()).next_multiple_of(4);
                    encoder.copy_buffer_to_buffer(from.buffer(), 0, to, *at, bytes);
                    steps.next();
                }
                Step::Dispatch { .. } => {
                    let mut pass = encoder.begin_compute_pass(&Default::default());
                    while let Some(Step::Dispatch {
                        pipeline,
                        bind_group,
                        groups,
                    }) = steps.next_if(|step| matches!(step, Step::Dispatch { .. }))
                    {
                        pass.set_pipeline(pipeline);
                        pass.set_bind_group(0, bind_group, &[]);
                        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
                    }
                }
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
