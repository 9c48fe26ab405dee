//! The pool, copies and staging.

use std::time::Instant;

use lawson_core::ErrorKind;
use lawson_cuda::Staging;

use super::{device, micros};

#[test]
#[ignore = "needs a GPU"]
fn memory_is_accounted_exactly_and_refused_in_time() {
    let device = device();
    assert_eq!((device.usage().in_use, device.usage().peak), (0, 0));
    let a = device.alloc(1000).expect("memory");
    let b = device.alloc(3 << 20).expect("memory");
    assert_eq!(device.usage().in_use, 1000 + (3 << 20));
    let address = a.ptr();
    drop(a);
    assert_eq!((device.usage().in_use, device.usage().peak), (3 << 20, 1000 + (3 << 20)));
    let reserved = device.usage().reserved;
    let a = device.alloc(1001).expect("memory");
    assert_eq!((a.ptr(), device.usage().reserved), (address, reserved), "a dropped block is used again");
    device.reset_peak();
    assert_eq!(device.usage().peak, 1001 + (3 << 20));

    let free = device.free_bytes().expect("free");
    let error = device.alloc(free as usize + (1 << 30)).expect_err("more than there is");
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert_eq!(device.alloc(usize::MAX).expect_err("more than a number holds").kind(), ErrorKind::OutOfMemory);
    assert_eq!(device.usage().in_use, 1001 + (3 << 20), "a refusal changes nothing");
    b.write(&[7u8; 3 << 20]).expect("still there");
    assert_eq!(b.to_vec::<u8>(3 << 20).expect("still there"), vec![7; 3 << 20]);

    // What is kept for later makes room for what is needed now.
    let large = device.free_bytes().expect("free") as usize / 10 * 6;
    drop(device.alloc(large).expect("memory"));
    let other = device.alloc(large / 8 * 9).expect("the pool gives back what nobody uses");
    drop((a, b, other));
    device.trim().expect("trimmed");
    assert_eq!((device.usage().in_use, device.usage().reserved), (0, 0));
    let empty = device.alloc(0).expect("nothing");
    assert!(empty.ptr() != 0 && empty.write::<f32>(&[]).is_ok() && empty.write(&[1u8]).is_err());

    let to = device.alloc(64).expect("memory");
    let staging = Staging::new(&device, 64, 3).expect("page-locked memory");
    let started = Instant::now();
    for i in 0..100i32 {
        staging.send(&to, 4, &[i, i + 1, i + 2]).expect("sent");
    }
    println!("staged copy: {:.2} µs of host time", micros(started.elapsed()) / 100.0);
    let mut got = [0i32; 3];
    to.read_at(4, &mut got).expect("read");
    assert_eq!(got, [99, 100, 101]);
    for i in 0..10i32 {
        let (a, b) = ([i, i + 1], [i + 2]);
        staging.send_all(&to, [(20, &a[..]), (0, &[]), (32, &b[..])].into_iter()).expect("sent");
    }
    let (mut pair, mut one) = ([0i32; 2], [0i32; 1]);
    to.read_at(20, &mut pair).expect("read");
    to.read_at(32, &mut one).expect("read");
    assert_eq!((pair, one), ([9, 10], [11]));
    assert!(staging.send_all(&to, [(0, &[0i32; 9][..]), (0, &[0i32; 8][..])].into_iter()).is_err(), "more than a piece");
    assert!(staging.send_all(&to, [(0, &[1i32][..]), (64, &[0i32][..])].into_iter()).is_err(), "behind the buffer");
    to.read_at(4, &mut got).expect("read");
    assert_eq!(got, [99, 100, 101], "what is refused sends nothing");
    assert!(staging.send(&to, 0, &[0u8; 65]).is_err() && staging.send(&to, 60, &[0u64]).is_err());
    let copy = device.alloc(12).expect("memory");
    copy.copy_from(0, &to, 4, 12).expect("copied");
    assert_eq!(copy.to_vec::<i32>(3).expect("read"), [99, 100, 101]);
}
