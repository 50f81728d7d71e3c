// Package setting reads the settings of a provider's driver: the text that users
// give, one value after the other, each within the driver's limits. What is wrong is
// said in the same words by every driver.
//
// It is a leaf: it imports package provider, for its errors, and never a driver.
package setting
