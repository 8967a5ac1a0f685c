/* See shim.h. */
#include <rte_cycles.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_lcore.h>
#include <rte_mbuf.h>
#include <rte_pause.h>
#include <rte_ring.h>

#include "shim.h"

int tf_errno(void) { return rte_errno; }
unsigned int tf_lcore_id(void) { return rte_lcore_id(); }
uint64_t tf_rdtsc(void) { return rte_rdtsc(); }
void tf_pause(void) { rte_pause(); }

uint16_t tf_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count) {
    return rte_eth_rx_burst(port, queue, mbufs, count);
}

uint16_t tf_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count) {
    return rte_eth_tx_burst(port, queue, mbufs, count);
}

struct rte_mbuf *tf_mbuf_alloc(struct rte_mempool *pool) { return rte_pktmbuf_alloc(pool); }
void tf_mbuf_free(struct rte_mbuf *mbuf) { rte_pktmbuf_free(mbuf); }

void tf_mbuf_free_bulk(struct rte_mbuf **mbufs, unsigned int count) {
    rte_pktmbuf_free_bulk(mbufs, count);
}

unsigned int tf_ring_enqueue_burst(struct rte_ring *ring, void *const *objects, unsigned int count) {
    return rte_ring_enqueue_burst(ring, objects, count, NULL);
}

unsigned int tf_ring_dequeue_burst(struct rte_ring *ring, void **objects, unsigned int count) {
    return rte_ring_dequeue_burst(ring, objects, count, NULL);
}
