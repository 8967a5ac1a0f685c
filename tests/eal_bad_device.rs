//! EAL refuses a virtual device without a driver; the error says what to check. EAL starts once in a
//! process, so this is a process of its own.

#![cfg(feature = "dpdk")]

use taffrail::eal::{EalArgs, EalError, Environment};

#[test]
fn a_device_without_a_driver_is_refused_in_words() {
    let arguments = EalArgs::new(&format!("tf-bad-{}", std::process::id()), &[0], &[])
        .memory(64, false)
        .pci(&[])
        .vdev("net_nosuchdriver0");
    let error = Environment::start(&arguments).unwrap_err();
    assert!(matches!(error, EalError::Init { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("net_nosuchdriver0"), "{text}");
    assert!(text.contains("driver is installed"), "{text}");
    // The one start is used up.
    assert_eq!(Environment::start(&arguments).unwrap_err(), EalError::Twice);
}
