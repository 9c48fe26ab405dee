//! CUDA graphs: work enqueued once, replayed with one call.

use std::ptr;

use cudarc::driver::sys;
use lawson_core::Result;

use crate::{
    device::Device,
    driver::{CUgraph, CUgraphExec, check},
};

/// Captured work of a device's stream.
pub struct Graph {
    exec: CUgraphExec,
    nodes: usize,
    device: Device,
}

// SAFETY: a graph is a name that the driver looks up; one thread at a time may launch it, and `replay` takes it exclusively.
unsafe impl Send for Graph {}

/// A graph that is destroyed with this value.
struct Captured(CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: from `cuStreamEndCapture`, destroyed only here.
            unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

impl Graph {
    /// Captures what `enqueue` enqueues on `device`, instead of running it. Everything it needs has been compiled, planned and allocated by
    /// running it once before; it may not wait or copy to or from the host.
    ///
    /// # Errors
    /// Those of `enqueue`; [`ErrorKind::Device`](lawson_core::ErrorKind::Device) when it did what cannot be captured. The device works on after
    /// either.
    ///
    /// # Safety
    /// All memory and kernels that the work uses outlive the graph.
    pub unsafe fn capture(device: &Device, enqueue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let _closed = device.hold_closed()?;
        device.bind()?;
        let doing = || format!("capturing work on {}", device.info().name);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live.
        check(unsafe { sys::cuStreamBeginCapture_v2(device.raw_stream(), mode) }, doing)?;
        // Ends the capture also when `enqueue` panics: a stream left capturing would be of no use to anybody.
        struct End<'a>(&'a Device, Captured);
        impl End<'_> {
            fn end(&mut self) -> sys::CUresult {
                // SAFETY: the stream is live and capturing; the place outlives the call.
                unsafe { sys::cuStreamEndCapture(self.0.raw_stream(), &mut self.1.0) }
            }
        }
        struct Guard<'a>(Option<End<'a>>);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                if let Some(end) = &mut self.0 {
                    let _ = end.end();
                }
            }
        }
        let mut guard = Guard(Some(End(device, Captured(ptr::null_mut()))));
        let enqueued = enqueue();
        let Some(mut end) = guard.0.take() else { unreachable!("set above") };
        let ended = end.end();
        // What went wrong in there says more than that the capture did not end well.
        enqueued?;
        check(ended, doing)?;
        let graph = end.1;
        let mut nodes = 0;
        // SAFETY: the graph is live; a null list asks for the number alone.
        check(unsafe { sys::cuGraphGetNodes(graph.0, ptr::null_mut(), &mut nodes) }, doing)?;
        let mut exec = ptr::null_mut();
        // SAFETY: the graph is live, `exec` outlives the call; `Graph::drop` destroys it.
        check(unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph.0, 0) }, doing)?;
        Ok(Graph { exec, nodes, device: device.clone() })
    }

    /// Launches, copies and fills in it.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// Enqueues all of it.
    ///
    /// # Errors
    /// [`ErrorKind::Device`](lawson_core::ErrorKind::Device) with the driver's word.
    pub fn replay(&mut self) -> Result<()> {
        let _open = self.device.hold_open()?;
        self.device.bind()?;
        // SAFETY: the graph and the stream are live; what the work uses is so by the claim made at its capture.
        check(unsafe { sys::cuGraphLaunch(self.exec, self.device.raw_stream()) }, || {
            format!("replaying a graph of {} steps on {}", self.nodes, self.device.info().name)
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // A replay may be under way.
        if self.device.synchronize().is_ok() {
            // SAFETY: instantiated by `capture`, destroyed only here.
            unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}
