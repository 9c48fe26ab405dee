//! What a machine without a driver, NVRTC or cuBLASLt gets: a value. On one that has them the same calls succeed.

use lawson_core::{ErrorKind, Result};
use lawson_cuda::{Device, Nvrtc, devices, has_driver, missing_libraries};

fn check<T>(result: Result<T>, words: &[&str]) {
    let Err(error) = result else { return };
    let message = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{message}");
    assert!(words.iter().any(|w| message.contains(w)), "{message}");
    println!("{message}");
}

#[test]
fn without_a_driver_or_gpu_every_call_says_what_is_missing() {
    let words =
        ["no NVIDIA driver was found", "shows no GPU", "starting the NVIDIA driver", "older than CUDA 12.0", "counting GPUs"];
    check(devices(), &words);
    check(Device::open(0), &words);
    // The second answer is the first.
    check(devices(), &words);
}

#[test]
fn a_gpu_that_is_not_there_is_unavailable() {
    let error = Device::open(usize::MAX).expect_err("no machine has so many");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

#[test]
fn without_nvrtc_the_error_says_where_it_comes_from() {
    check(Nvrtc::load().map(|_| ()), &["pip install nvidia-cuda-nvrtc"]);
}

#[test]
fn every_missing_library_is_named_with_where_to_get_it() {
    let missing: Vec<String> = missing_libraries().iter().map(ToString::to_string).collect();
    for (here, sign) in [(has_driver() && devices().is_ok(), "driver"), (Nvrtc::load().is_ok(), "pip install nvidia-cuda-nvrtc")]
    {
        assert_eq!(missing.iter().any(|text| text.contains(sign)), !here, "{missing:?}");
    }
    assert!(missing.len() <= 3, "{missing:?}");
}
