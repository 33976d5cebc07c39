"""Time into money: price book, the meter that partitions held time, and the shares of each row. No I/O."""
