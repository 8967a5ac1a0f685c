//! Safe types over DPDK: environment, mempool, mbuf, port, ring, lcore.
