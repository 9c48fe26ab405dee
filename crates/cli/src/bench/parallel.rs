//! Work of the benchmark itself on several threads: inputs and the oracle's rows.

/// `f(0), f(1) … f(n − 1)`, computed on `threads` threads.
pub fn map<T: Send>(n: usize, threads: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let share = n.div_ceil(threads.max(1)).max(1);
    let part = |start: usize| (start..n.min(start + share)).map(&f).collect::<Vec<T>>();
    std::thread::scope(|scope| {
        let part = &part;
        let running: Vec<_> = (0..n).step_by(share).skip(1).map(|start| scope.spawn(move || part(start))).collect();
        let mut all = part(0);
        for handle in running {
            match handle.join() {
                Ok(more) => all.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn results_come_in_order() {
        for n in [0, 1, 2, 7] {
            assert_eq!(super::map(n, 3, |i| i * i), (0..n).map(|i| i * i).collect::<Vec<_>>());
        }
    }
}
