//! The thread pool.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicUsize, Ordering},
};

use lawson_cpu::threads::Threads;

/// Runs a loop of `items` and checks that each item ran once, on a thread that exists.
fn each_item_runs_once(pool: &Threads, items: usize) {
    let runs: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
    pool.run(items, &|thread, item| {
        assert!(thread < pool.count());
        runs[item].fetch_add(1, Ordering::Relaxed);
    });
    assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 1), "{} threads, {items} items: {runs:?}", pool.count());
}

#[test]
fn every_item_runs_once() {
    for threads in 1..=4 {
        let pool = Threads::new(threads).unwrap();
        assert_eq!(pool.count(), threads);
        for items in [0, 1, 2, 3, 4, 5, 64, 1000] {
            each_item_runs_once(&pool, items);
        }
    }
}

#[test]
fn many_tiny_loops() {
    for threads in 1..=4 {
        let (pool, sum) = (Threads::new(threads).unwrap(), AtomicUsize::new(0));
        for _ in 0..2000 {
            pool.run(3, &|_, item| {
                sum.fetch_add(item + 1, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 2000 * 6);
    }
}

#[test]
fn loops_after_a_pause_find_sleeping_workers() {
    let pool = Threads::new(3).unwrap();
    for _ in 0..5 {
        // Longer than an idle worker looks for work before it sleeps.
        std::thread::sleep(std::time::Duration::from_millis(20));
        each_item_runs_once(&pool, 100);
    }
}

#[test]
fn items_run_on_several_threads() {
    let (pool, arrived) = (Threads::new(2).unwrap(), AtomicUsize::new(0));
    // Neither item ends before the other has begun.
    pool.run(2, &|_, _| {
        arrived.fetch_add(1, Ordering::SeqCst);
        while arrived.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
    });
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_survives() {
    for threads in 1..=4 {
        let pool = Threads::new(threads).unwrap();
        for at in [0, 37, 99] {
            let job = |_: usize, item: usize| {
                if item == at {
                    std::panic::panic_any(item);
                }
            };
            let payload = catch_unwind(AssertUnwindSafe(|| pool.run(100, &job))).expect_err("the panic is lost");
            assert_eq!(payload.downcast_ref::<usize>(), Some(&at), "{threads} threads");
            each_item_runs_once(&pool, 100);
        }
    }
}

#[test]
fn callers_take_turns() {
    let (pool, inside, sum) = (Threads::new(2).unwrap(), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let (pool, inside, sum) = (&pool, &inside, &sum);
            scope.spawn(move || {
                for _ in 0..200 {
                    pool.run(8, &|_, _| {
                        // Encoded as 16 items for each caller: two callers at once would mix.
                        let others = inside.fetch_add(1 << (8 * caller), Ordering::SeqCst) & !(0xff << (8 * caller));
                        assert_eq!(others, 0, "two loops run at once");
                        sum.fetch_add(1, Ordering::Relaxed);
                        inside.fetch_sub(1 << (8 * caller), Ordering::SeqCst);
                    });
                }
            });
        }
    });
    assert_eq!(sum.into_inner(), 4 * 200 * 8);
}

#[test]
fn numbers_out_of_range_are_refused() {
    for threads in [0, 1025] {
        let error = Threads::new(threads).err().expect("accepted").to_string();
        assert!(error.contains("between 1 and 1024") && error.contains(&threads.to_string()), "{error}");
    }
}
