/* DPDK's inline functions and per-lcore variables as ordinary symbols; no policy. */
#ifndef TAFFRAIL_SHIM_H
#define TAFFRAIL_SHIM_H

#include <stdint.h>

struct rte_mbuf;
struct rte_mempool;
struct rte_ring;

int tf_errno(void);
unsigned int tf_lcore_id(void);
uint64_t tf_rdtsc(void);
void tf_pause(void);

uint16_t tf_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count);
uint16_t tf_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count);

struct rte_mbuf *tf_mbuf_alloc(struct rte_mempool *pool);
void tf_mbuf_free(struct rte_mbuf *mbuf);
void tf_mbuf_free_bulk(struct rte_mbuf **mbufs, unsigned int count);

unsigned int tf_ring_enqueue_burst(struct rte_ring *ring, void *const *objects, unsigned int count);
unsigned int tf_ring_dequeue_burst(struct rte_ring *ring, void **objects, unsigned int count);

#endif
