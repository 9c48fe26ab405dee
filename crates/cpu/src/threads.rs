//! The thread pool: parallel loops over work items that are handed out one by one.
//!
//! Results never depend on which thread computes an item, so neither on how many threads there are.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use lawson_core::{Error, ErrorKind, Result};

/// What a worker calls: thread index, item index.
type Job<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// How often an idle thread looks for work before it sleeps: some tens of microseconds, longer than the gap between two steps.
const SPINS: u32 = 20_000;

struct Shared {
    /// Counts jobs; a change tells workers that one is there.
    epoch: AtomicU32,
    stop: AtomicBool,
    /// The job of this epoch, while workers may still join it.
    job: Mutex<Option<(*const Job<'static>, usize)>>,
    wake: Condvar,
    next: AtomicUsize,
    /// Workers that have joined this epoch's job and not left it; grows only under the lock of `job`.
    running: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: a worker takes the job pointer under the lock, counting itself in `running`; `run` takes the job back under the same lock and
// waits for `running` to be 0 before the closure can go; the closure is Sync.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A fixed set of threads; the caller of [`Threads::run`] is one of them.
pub struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One loop at a time.
    gate: Mutex<()>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Threads {
    /// `threads` threads in all, the caller's included.
    ///
    /// # Errors
    /// `InvalidInput` for 0 or more than 1024, `Device` when the system starts no thread.
    pub fn new(threads: usize) -> Result<Self> {
        if !(1..=1024).contains(&threads) {
            return Err(Error::invalid(format!("threads must be between 1 and 1024, got {threads}")));
        }
        let shared = Arc::new(Shared {
            epoch: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            job: Mutex::new(None),
            wake: Condvar::new(),
            next: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            panic: Mutex::new(None),
        });
        let mut pool = Threads { shared, workers: Vec::new(), gate: Mutex::new(()) };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("lawson-{index}"))
                .spawn(move || shared.work(index))
                .map_err(|e| Error::new(ErrorKind::Device, format!("thread {index} of {threads} cannot be started: {e}")))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads in all.
    pub fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(thread, item)` once for each item in 0 .. `items`, on all threads; returns when all are done.
    /// One loop runs at a time: calling this from inside a job of the same pool deadlocks.
    ///
    /// # Panics
    /// With the first panic of `job`, after every thread has stopped.
    pub fn run(&self, items: usize, job: &Job<'_>) {
        let _gate = lock(&self.gate);
        if self.workers.is_empty() || items <= 1 {
            (0..items).for_each(|i| job(0, i));
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased; `run` returns after every worker that joined has left the job.
        let erased: *const Job<'static> = unsafe { std::mem::transmute(std::ptr::from_ref(job)) };
        shared.next.store(0, Ordering::Relaxed);
        {
            let mut slot = lock(&shared.job);
            *slot = Some((erased, items));
            shared.epoch.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        shared.share(job, 0, items);
        // A worker that has not woken by now is not waited for.
        lock(&shared.job).take();
        let mut spins = 0u32;
        while shared.running.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Some(payload) = lock(&shared.panic).take() {
            std::panic::resume_unwind(payload);
        }
    }
}

impl Shared {
    fn share(&self, job: &Job<'_>, thread: usize, items: usize) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let item = self.next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                job(thread, item);
            }
        }));
        if let Err(payload) = result {
            self.next.store(items, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.epoch.load(Ordering::Acquire) == seen && !self.stop.load(Ordering::Relaxed) && spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            }
            let job = {
                let mut slot = lock(&self.job);
                while self.epoch.load(Ordering::Acquire) == seen && !self.stop.load(Ordering::Relaxed) {
                    slot = self.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
                }
                seen = self.epoch.load(Ordering::Acquire);
                if slot.is_some() {
                    self.running.fetch_add(1, Ordering::Relaxed);
                }
                *slot
            };
            if let Some((job, items)) = job {
                // SAFETY: `run` waits for this worker's decrement below before the closure can go.
                self.share(unsafe { &*job }, thread, items);
                self.running.fetch_sub(1, Ordering::Release);
            }
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        {
            let _slot = lock(&self.shared.job);
            self.shared.stop.store(true, Ordering::Relaxed);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its jobs' panics, so joining cannot fail.
            let _ = worker.join();
        }
    }
}
