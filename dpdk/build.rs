//! Finds the distribution's DPDK, compiles the shim and generates the bindings.
//!
//! pkg-config's flags go to compiler and bindgen verbatim: they hold `-include rte_config.h` and
//! `-march=corei7`, on which structure layouts depend.

use std::path::PathBuf;
use std::process::Command;

/// What is linked; EAL loads drivers and mempool operations from its plugin folder by itself.
const LIBRARIES: [&str; 5] = [
    "rte_eal",
    "rte_ethdev",
    "rte_mbuf",
    "rte_mempool",
    "rte_ring",
];
/// The release whose structure layouts the code above the bindings knows.
const RELEASE: &str = "22.11";

/// Macros made with RTE_BIT64 are bits of a 64-bit field: as i64, bit 63 would be a sign.
#[derive(Debug)]
struct Macros;

impl bindgen::callbacks::ParseCallbacks for Macros {
    fn int_macro(&self, name: &str, _value: i64) -> Option<bindgen::callbacks::IntKind> {
        let bits = [
            "RTE_MBUF_F_",
            "RTE_ETH_RX_OFFLOAD_",
            "RTE_ETH_TX_OFFLOAD_",
            "RTE_ETH_RSS_",
        ];
        bits.iter()
            .any(|prefix| name.starts_with(prefix))
            .then_some(bindgen::callbacks::IntKind::U64)
    }
}

fn pkg_config(arguments: &[&str]) -> Vec<String> {
    let output = Command::new("pkg-config").args(arguments).output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        _ => panic!(
            "pkg-config {arguments:?} failed: install DPDK's development files (apt-get install libdpdk-dev \
             pkg-config), or build without the packet path (cargo build --no-default-features)"
        ),
    }
}

fn main() {
    for file in ["wrapper.h", "shim.h", "shim.c", "build.rs"] {
        println!("cargo::rerun-if-changed={file}");
    }
    println!("cargo::rerun-if-env-changed=PKG_CONFIG_PATH");
    let version = pkg_config(&["--modversion", "libdpdk"]).concat();
    assert!(
        version.starts_with(RELEASE),
        "DPDK {version} is installed, this code knows the structure layouts of {RELEASE} (Debian 12: apt-get install libdpdk-dev)"
    );
    let flags = pkg_config(&["--cflags", "libdpdk"]);

    let mut shim = cc::Build::new();
    shim.file("shim.c").opt_level(3).warnings(true);
    for flag in &flags {
        shim.flag(flag);
    }
    shim.compile("taffrail_shim");
    for flag in pkg_config(&["--libs-only-L", "libdpdk"]) {
        println!(
            "cargo::rustc-link-search=native={}",
            flag.trim_start_matches("-L")
        );
    }
    for library in LIBRARIES {
        println!("cargo::rustc-link-lib=dylib={library}");
    }

    let bindings = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_args(&flags)
        .allowlist_function("rte_(eal_(init|cleanup|remote_launch|wait_lcore|process_type)|strerror|get_next_lcore|lcore_count|lcore_to_cpu_id|lcore_to_socket_id|thread_register|thread_unregister|socket_id|get_tsc_hz)")
        .allowlist_function("rte_eth_(dev_.*|rx_queue_setup|tx_queue_setup|stats_get|stats_reset|xstats_get|xstats_get_names|link_get_nowait|macaddr_get|promiscuous_.*|allmulticast_.*|find_next|macaddr_add)")
        .allowlist_function("rte_(pktmbuf_pool_create|mempool_free|mempool_avail_count|mempool_in_use_count)")
        .allowlist_function("rte_ring_(create|free)")
        .allowlist_function("tf_.*")
        .allowlist_type("rte_(mbuf|eth_dev_info|eth_conf|eth_stats|eth_link|eth_xstat|eth_xstat_name|ether_addr)")
        .allowlist_var("RTE_(MBUF_F_RX_.*|MAX_ETHPORTS|ETH_RX_OFFLOAD_.*|ETH_RSS_.*|PKTMBUF_HEADROOM|ETH_NAME_MAX_LEN|MAX_LCORE|ETH_LINK_.*)")
        .allowlist_var("RING_F_.*")
        .opaque_type("rte_gtp_psc_.*|rte_l2tpv2_.*")
        .blocklist_item("per_lcore_.*")
        .clang_macro_fallback()
        .clang_macro_fallback_build_dir(PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR")))
        .derive_default(false)
        .layout_tests(false)
        .generate_comments(false)
        .parse_callbacks(Box::new(Macros))
        .generate()
        .expect("bindgen reads DPDK's headers (apt-get install libclang-14-dev)");
    let out =
        PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs");
    bindings.write_to_file(out).expect("OUT_DIR is writable");
}
