"""What is done before a swap: the test of W0 on the devices, and the fetching of variants that are likely next."""
